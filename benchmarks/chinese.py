"""A table of the documents in Chinese: its words are translated, cell by cell, its numbers stay."""

import re


# A cell that is one of these, as a whole.
WORDS = {
    "models": "模型",
    "predicted": "预测误差",
    "trained": "训练",
    "evaluated": "评测",
    "merged": "合并",
    "packed": "packing",
    "Llama (text alone)": "Llama（纯文本）",
    "yes": "是",
    "no": "否",
    "refused": "拒绝",
    "tokens": "token 数",
    "strategy": "策略",
    "full": "全量",
    "device, predicted": "显存，预测",
    "host RAM": "主机内存",
    "stage": "阶段",
    "split": "切分什么",
    "none (DDP)": "不用（DDP）",
    "nothing": "不切分",
    "optimizer state": "优化器状态",
    "optimizer state, gradients": "优化器状态、梯度",
    "optimizer state, gradients, weights": "优化器状态、梯度、权重",
    "gradient checkpointing": "梯度检查点",
    "allocated": "张量",
    "of which activations": "其中激活值",
    "TFLOP a step": "一步的 TFLOP",
    "GPUs": "GPU",
    "passed": "通过",
    "failed": "失败",
    "skipped": "跳过",
    "seconds": "秒数",
    "card": "显卡",
    "two tokens": "前两个 token",
    "each further one": "之后每个 token",
    "config": "配置",
    "processes": "进程数",
    "weights, optimizer, gradients": "权重、优化器、梯度",
    "rounding of pinned memory": "锁页内存取整",
    "process": "进程本身",
    "workers and batches": "worker 和 batch",
    "other": "其他",
    "sum": "合计",
    "all": "全量",
    "parameters": "参数量",
    "share": "占比",
    "device": "显存",
    "projector and mining alone": "只有 projector 和 patch info mining",
    "all but the towers": "图像编码器以外的全部",
    "model": "模型",
    "update": "一次更新",
    "tokens/s a GPU": "每卡 token/s",
    "efficiency": "效率",
    "of medians": "效率（中位数）",
    "error of the predicted device": "显存预测误差",
}
# A part of a cell or of a line above the table, and what stands for it.
PARTS = {
    r"^within (\S+)$": r"\1 以内",
    r"^device, measured on an (\w+)$": r"显存，\1 实测",
    r"^full, (\d) GPUs?$": r"全量，\1 卡",
    r"^LoRA, (\d) GPUs?$": r"LoRA，\1 卡",
    r"^LoRA r=(\d+) on q, v, o; projector and mining$": r"LoRA r=\1（q、v、o），加 projector 和 patch info mining",
    r"^LoRA r=(\d+) on all linear layers; projector and mining$": (
        r"LoRA r=\1（全部线性层），加 projector 和 patch info mining"
    ),
    r"^(NVIDIA \w+), NVLink, PyTorch (\S+)\.$": r"\1，用 NVLink 连接，PyTorch \2。",
    r"^(\S+), LoRA, (\d+ x \d+)$": r"\1，LoRA，\2",
    r"^(\S+), all weights, (\d+ x \d+)$": r"\1，全量微调，\2",
    r"^(\d+) GPUs$": r"\1 卡",
    r"^sent, (\d+) GPUs$": r"发送量，\1 卡",
}


def in_chinese(table: str) -> str:
    return re.sub(r"(?<=\| ).+?(?= \|)|^[^|\n]+$", lambda part: translated(part[0]), table, flags=re.MULTILINE)


def translated(cell: str) -> str:
    for pattern, replacement in PARTS.items():
        cell = re.sub(pattern, replacement, cell)
    return WORDS.get(cell, cell)

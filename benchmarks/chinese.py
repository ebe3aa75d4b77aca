"""A table of the documents in Chinese, with the lines around it: words are translated, numbers stay."""

import re
from collections.abc import Callable


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
    "nothing": "无",
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
    "budget": "显存预算",
    "rows": "序列数",
    "recomputed": "重算什么",
    "device, measured": "显存，实测",
    "peak's error": "峰值误差",
    "update, predicted": "更新，预测",
    "update, measured": "更新，实测",
    "GPU busy": "GPU 忙的时间",
    "all layers": "全部层",
    "all layers, MLPs whole": "全部层，MLP 不分片",
    "capacity": "容量",
    "CUDA's own memory, margin": "CUDA 自身占用，余量",
    "capacity from": "容量的来源",
    "measured": "实测",
    "technique": "技术",
    "full fine-tuning, with logits": "全量微调，保留全部 logits",
    "+ gradient checkpointing": "+ 梯度检查点",
    "+ no logits": "+ 不生成 logits",
    "+ mining from the query's side": "+ 从 query 一侧计算 patch info mining",
    "+ MLP in tiles": "+ MLP 分片",
    "then 4-bit weights": "再加 4-bit 权重",
    "or ZeRO-3, all offloaded": "或加 ZeRO-3，全部 offload",
    "saved when used alone": "单独使用省多少",
    "peak without it": "去掉它的峰值",
    "accelerate's estimate": "accelerate 的估计",
    "DeepSpeed's estimate": "DeepSpeed 的估计",
    "flags": "参数",
    "defaults": "默认值",
    "error: allocated": "张量误差",
    "error: reserved": "段误差",
    "error: device": "显存误差",
    "layers recomputed whole": "整层重算的层数",
    "MLPs recomputed alone": "只重算 MLP 的层数",
    "an update": "一次更新",
    "method": "做法",
    "memory on top of the inputs": "输入之外占多少",
    "time": "时间",
    "error of the gradient": "梯度误差",
    "all positions": "全部位置",
    "labelled positions": "有标签的位置",
    "checkpointed chunks": "分块，反向传播时重算",
    "rows x tokens": "序列数 x token 数",
    "trainer": "训练框架",
    "step": "一步",
    "tokens/s": "token/s",
    "of the matrix rate": "算力利用率",
    "with all that runs": "算力利用率，全部运算",
    "peak": "峰值",
    "kernels": "kernel 数",
    "floor": "下限",
    "tokens/s against the fastest": "token/s，与最快者之比",
    "peak against the smallest": "峰值，与最省者之比",
    "which is": "是哪一个",
    "seconds of an update": "一次更新的时间",
    "of which the GPU works": "其中 GPU 忙的时间",
    "median error": "误差中位数",
    "worst": "最大误差",
    "pairs of which the faster one is told": "两种配置谁更快，判断正确的比例",
    "MGM-2B and others": "MGM-2B 和其他模型",
    "constants come from it": "用来定常数",
    "error": "误差",
    "the GPU works": "GPU 忙的时间",
    "batches": "怎样组 batch",
    "number": "micro-batch 数",
    "samples/s": "样本/s",
    "packed is faster by": "packing 是它的几倍",
    "workers": "worker 数",
    "images/s": "图像/s",
    "processor time an image": "每张图的处理器时间",
    "The demo's steps:": "Demo 的训练步：",
    "a step": "一步",
    "waits for its batch, median": "等 batch 的时间，中位数",
    "at most": "最长",
    "of the time": "占总时间",
    "updates": "更新次数",
    "questions an update": "一次更新的题数",
    "held-out questions": "留出题",
    "seeds": "随机种子",
    "exact answers": "完全答对",
    "each seed": "每个种子",
    "tensors' peak": "张量峰值",
    "process's peak": "进程峰值",
    "before training": "训练前",
    "full fine-tuning": "全量微调",
    "projector alone": "只训练 projector",
    "exact answers by question": "各题型完全答对",
    "all questions": "全部题目",
    "interval with the seeds": "计入种子的区间",
    "learning rate: exact answers": "学习率：完全答对",
    "chosen": "选中",
}
# A part of a cell or of a line, and what stands for it.
PARTS = {
    r"^within (\S+)$": r"\1 以内",
    r"^device, measured on an (\w+)$": r"显存，\1 实测",
    r"^full, (\d) GPUs?$": r"全量，\1 卡",
    r"^LoRA, (\d) GPUs?$": r"LoRA，\1 卡",
    r"^LoRA r=(\d+) on q, v, o; projector and mining$": r"LoRA r=\1（q、v、o），加 projector 和 patch info mining",
    r"^LoRA r=(\d+) on all linear layers; projector and mining$": (
        r"LoRA r=\1（全部线性层），加 projector 和 patch info mining"
    ),
    r"^LoRA r=(\d+), q v o$": r"LoRA r=\1（q、v、o）",
    r"^LoRA r=(\d+), all linear$": r"LoRA r=\1（全部线性层）",
    r"^(\S+%) \((\S+%) to (\S+%)\)$": r"\1（\2 到 \3）",
    r"^(\S+%) to (\S+%)$": r"\1 到 \2",
    r"^(NVIDIA \w+), NVLink, PyTorch (\S+)\.$": r"\1，用 NVLink 连接，PyTorch \2。",
    r"^(\S+), LoRA, (\d+ x \d+)$": r"\1，LoRA，\2",
    r"^(\S+), all weights, (\d+ x \d+)$": r"\1，全量微调，\2",
    r"^(\d+) GPUs$": r"\1 卡",
    r"^sent, (\d+) GPUs$": r"发送量，\1 卡",
    r"^(\d+) layers?$": r"\1 层",
    r"^(\d+) MLPs?$": r"\1 个 MLP",
    r"^(\d+) layers? and (\d+) MLPs?$": r"\1 层和 \2 个 MLP",
    r"^fits (\d+ GiB)$": r"\1 放得下",
    r"^not measured, (\S+ GiB)$": r"未实测，\1",
    r"^the nominal size less (\S+ GiB)$": r"标称容量减 \1",
    r"^device, (RTX \d+)$": r"显存，\1",
    r"^ours, chunks of (\d+)$": r"本项目，每块 \1 个位置",
    r"^On a CPU \(CPU, (\d+) threads, PyTorch (\S+)\): ": r"CPU（\1 线程，PyTorch \2）：",
    r"^On a GPU \((NVIDIA \w+), PyTorch (\S+)\): ": r"GPU（\1，PyTorch \2）：",
    r"(\d+) tokens, (\d+) of them labelled, (\S+) vocabulary entries, hidden size (\d+)\.$": (
        r"\1 个 token，其中 \2 个有标签，词表 \3 个词，hidden size \4。"
    ),
    r"^(NVIDIA [\w ]+), PyTorch (\S+)\.$": r"在 \1 上实测，PyTorch \2。",
    r"^(NVIDIA \w+), PyTorch (\S+)\. Sizes are measured; error = prediction / measurement - 1\. Default: bf16, LoRA "
    r"r=(\d+), one row of (\d+) tokens with an image, checkpointing\.$": (
        r"\1，PyTorch \2。大小是实测值；误差 = 预测 / 实测 - 1。"
        r"默认值：bf16，LoRA r=\3，一条 \4 个 token 的带图序列，开梯度检查点。"
    ),
    r"^Median error: allocated (\S+) \(worst (\S+)\), reserved (\S+) \(worst (\S+)\), device (\S+) "
    r"\(worst (\S+)\)\.$": r"误差中位数：张量 \1（最差 \2），段 \3（最差 \4），显存 \5（最差 \6）。",
    r"; updates of (\d+) samples of (\d+) tokens with an image\.$": (
        r"；一次更新 \1 个样本，每个 \2 个 token、一张图。"
    ),
    r"^Against the fastest of these that fits, the plan's choice keeps the GPU busy for ([\d.]+) of the time; against "
    r"one row with all layers checkpointed, as in the README's table, ([\d.]+\d)\.": (
        r"选中的方案，GPU 忙的时间是放得下的方案中最快者的 \1 倍，"
        r"是 README 表中方案（一条序列，全部层都重算）的 \2 倍。"
    ),
    r" With the fastest ones in turns, (\d+) times each, its update takes ([\d.]+) of the time of the fastest other, "
    r"and ([\d.]+\d) of README's\.$": (
        r"与最快的几个方案轮流各测 \1 次，它一次更新的时间是其余方案中最快者的 \2 倍，是 README 方案的 \3 倍。"
    ),
    r"^(\d+) cores, PyTorch on (\d+); ": r"\1 核，PyTorch 用 \2 个；",
    r"^(\d+) cores, (NVIDIA \w+); ": r"\1 核，\2；",
    r"\. (float32|bfloat16), (\d+%) of the tokens with labels\. A large matrix product runs at (\S+ TFLOP/s)\.$": (
        r"。\1，\2 的 token 有标签。一次大矩阵乘的速率是 \3。"
    ),
    r"^(\*\*\S+\*\*), (\d+) M parameters:$": r"\1，\2 M 个参数：",
    r"^([\w.-]+), (\d+ x \d+)\b": r"\1，\2",
    r"(\d+ x \d+), checkpointing\b": r"\1，梯度检查点",
    r"梯度检查点, (nf4|zero3)$": r"梯度检查点，\1",
    r"^(Trainer \+ PEFT|TRL SFTTrainer), Liger$": r"\1，Liger",
    r"; error = prediction / measurement - 1\. The (\d+) rows from which no constant comes:$": (
        r"；误差 = 预测 / 实测 - 1。没有用来定常数的 \1 种配置："
    ),
    r"^(Demo|Conversations): (\d+) to (\d+) tokens, (\d+) on average; at most (\d+) positions a micro-batch, "
    r"(\d+) packed rows or (\d+) padded samples:$": (
        r"\1：\2 到 \3 个 token，平均 \4 个；一个 micro-batch 最多 \5 个位置，"
        r"即 \6 条 packing 的序列，或 \7 个补齐的样本："
    ),
    r"^Conversations：": "对话：",
    r"^JPEGs of (\d+ x \d+) to both of MGM-2B's views, (\d+) cores, no GPU:$": (
        r"\1 的 JPEG，处理成 MGM-2B 两个图像编码器的输入，\2 核，没有 GPU："
    ),
}


def with_chinese(tables: dict[str, Callable[[], str]]) -> dict[str, Callable[[], str]]:
    """The tables, and the same in Chinese as `NAME zh`."""
    return tables | {f"{name} zh": (lambda table=table: in_chinese(table())) for name, table in tables.items()}


def in_chinese(table: str) -> str:
    return re.sub(r"(?<=\| )[^|\s].*?(?= \|)|^[^|\n].*", lambda found: translated(found[0]), table, flags=re.M)


def translated(text: str) -> str:
    """Of a cell or a line."""
    for pattern, replacement in PARTS.items():
        text = re.sub(pattern, replacement, text)
    return WORDS.get(text, text)

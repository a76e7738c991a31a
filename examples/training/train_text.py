"""Train the text model, a masked diffusion language model of 3.1 M parameters, on ``diffcache.assets.text_tasks``.

    python examples/training/train_text.py --out weights/text

The network is transformers' Llama with bidirectional attention. The answer is masked at a rate drawn uniformly from
(0, 1], and the loss is the cross-entropy at masked positions (LLaDA, arXiv 2502.09992, without the factor 1/t).
Training continues from the last checkpoint in ``--out``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from muon import Muon
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from diffcache.assets.text import decode
from diffcache.assets.text_tasks import MASK, TASKS, VOCABULARY, batch

WIDTH, LAYERS, HEADS, INNER = 192, 7, 6, 512


def network() -> LlamaForCausalLM:
    """Return the untrained network."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=1,
    )
    config.is_causal = False
    config.mask_token_id = MASK
    return LlamaForCausalLM(config)


def lengths(progress: float, random: np.random.Generator) -> int:
    """Return the length of the prompt (and of the answer): short sequences first, long ones last."""
    if progress < 0.35:
        return 64
    if progress < 0.6:
        return int(random.choice([64, 128], p=[0.3, 0.7]))
    return int(random.choice([64, 128, 256], p=[0.2, 0.4, 0.4]))


def accuracy(model: LlamaForCausalLM, task: str, length: int, count: int = 16) -> float:
    """Return the share of exact answers when each step commits the most confident token of a block of 32."""
    prompts, answers = batch(task, count, length, 10_000_000)
    found = decode(model, torch.from_numpy(prompts))
    return float((found[:, length:].numpy() == answers).all(1).mean())


def main() -> None:
    """Train, print the loss, and write checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--millions", type=float, default=14.0, help="tokens of the whole training, in millions")
    parser.add_argument("--rate", type=float, default=0.5, help="factor of the learning rates")
    parser.add_argument(
        "--bf16", action="store_true", help="compute in bfloat16, which is faster where the processor has it"
    )
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    model = network()
    model.set_attn_implementation("eager")  # on CPUs, the backward pass of SDPA is slower than two products
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        Muon(matrices, dtype=torch.bfloat16 if given.bf16 else torch.float32),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    rates = [[group["lr"] for group in o.param_groups] for o in optimizers]
    step, seen = 0, 0
    file = given.out / "checkpoint.pt"
    if file.exists():
        state = torch.load(file, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, seen = state["step"], state["seen"]
    random = np.random.default_rng(1000 + step)
    began = saved_at = time.monotonic()
    losses: dict[tuple[str, int], list[float]] = {}
    while (progress := seen / (1e6 * given.millions)) < 1:
        factor = given.rate * min(1.0, (step + 1) / 100) * min(1.0, 1.4 * (1 - progress))
        for optimizer, starts in zip(optimizers, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, starts, strict=True):
                group["lr"] = rate * factor
        length = lengths(progress, random)
        task = TASKS[step % 2]
        count = (2048 if progress < 0.35 else 4096) // (2 * length)
        prompts, answers = batch(task, count, length, random)
        rate = (torch.arange(count)[:, None] + float(random.random())) / count  # stratified over the batch
        hidden = torch.from_numpy(random.random((count, length))) < rate
        target = torch.from_numpy(answers)
        x = torch.cat([torch.from_numpy(prompts), target.masked_fill(hidden, MASK)], 1)
        with torch.autocast("cpu", torch.bfloat16, enabled=given.bf16):
            hidden_states = model.model(x).last_hidden_state[:, length:][hidden]
            logits = model.lm_head(hidden_states)
        loss = functional.cross_entropy(logits.float(), target[hidden])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + 2 * length * count
        losses.setdefault((task, length), []).append(loss.item())
        if step % 50 == 0:
            text = "  ".join(f"{t}/{n} {np.mean(v):.4f}" for (t, n), v in sorted(losses.items()))
            minutes = (time.monotonic() - began) / 60
            print(f"{step} {minutes:.1f} min {seen / 1e6:.2f} M tokens lr {factor:.2f}  {text}", flush=True)
            losses.clear()
        if time.monotonic() - saved_at > 300:
            saved_at = time.monotonic()
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizers": [o.state_dict() for o in optimizers],
                    "step": step,
                    "seen": seen,
                },
                file,
            )
    model.to(torch.bfloat16).save_pretrained(given.out, max_shard_size="4500KB")
    model.float()
    for task in TASKS:
        for length in (64, 128, 256):
            print(task, 2 * length, f"{accuracy(model, task, length):.3f}", flush=True)


if __name__ == "__main__":
    main()

"""Train the default model: `python -m gllm.runtime.default_model.train --out DIR --device cuda`.

Qwen3's architecture in transformers' own implementation, random weights at first; the loss counts answers alone.
Legend: R rows of a batch, W width of a row, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import Qwen3Config, Qwen3ForCausalLM

from gllm.console.terminal import say
from gllm.runtime.default_model.corpus import IGNORED, packed_rows
from gllm.runtime.default_model.model_folder import MODEL, write_model
from gllm.runtime.default_model.score import score

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PEAK_RATE = 2e-3
NUM_WARMUP_STEPS = 300
NUM_LINES = 60
"""Progress lines of a whole run."""


class Corpus(IterableDataset[Any]):
    """Batches for ever; each loading process draws from a seed of its own."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    def __iter__(self) -> Iterator[Any]:
        """Tokens, document numbers and targets, each (R, W)."""
        info = get_worker_info()
        number = 0 if info is None else info.id
        return packed_rows(self.args.rows, self.args.width, f"train {self.args.seed} {number}")


def main(argv: Sequence[str] | None = None) -> int:
    """Train, score and write the model; returns the exit status."""
    args = _parser().parse_args(argv)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    model = _model(args)
    say(f"{sum(weight.numel() for weight in model.parameters()):,} weights, {vars(args)}")
    _train(model, args)
    args.out.mkdir(parents=True, exist_ok=True)
    write_model(args.out, model.to(torch.bfloat16).state_dict())  # what is written is what is scored
    torch.set_float32_matmul_precision("highest")
    scores = {
        str(dtype).removeprefix("torch."): _scored(model, args, dtype) for dtype in (torch.float32, torch.bfloat16)
    }
    (args.out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", "utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train the default model.", allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--init", type=Path, help="a model folder to go on from; default: random weights")
    parser.add_argument("--steps", type=int, default=14000, help="batches (default: 14000)")
    parser.add_argument("--rows", type=int, default=128, help="of a batch (default: 128)")
    parser.add_argument("--width", type=int, default=1024, help="tokens of a row (default: 1024)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: cuda)")
    parser.add_argument(
        "--rate", type=float, default=PEAK_RATE, help=f"of learning, at its peak (default: {PEAK_RATE})"
    )
    parser.add_argument("--num-workers", type=int, default=12, help="processes that make batches (default: 12)")
    parser.add_argument("--num-cases", type=int, default=8000, help="held-out cases to score (default: 8000)")
    return parser


def _model(args: argparse.Namespace) -> nn.Module:
    qwen3: Any = Qwen3ForCausalLM  # transformers leaves it untyped
    if args.init is None:
        model: nn.Module = qwen3(Qwen3Config(**MODEL))
    else:
        model = qwen3.from_pretrained(args.init, dtype=torch.float32)
    return model.to(args.device)


def _train(model: nn.Module, args: argparse.Namespace) -> None:
    """Run the schedule: warm-up, then a linear way down to nothing."""
    optimizer = _optimizer(model, args)
    compiled = torch.compile(_loss) if args.device == "cuda" else _loss
    loader = DataLoader(Corpus(args), batch_size=None, num_workers=args.num_workers, pin_memory=args.device == "cuda")
    begin, losses = time.monotonic(), torch.zeros((), device=args.device)
    every = max(1, args.steps // NUM_LINES)
    for step, batch in enumerate(loader, 1):
        done = step / args.steps
        for group in optimizer.param_groups:
            group["lr"] = args.rate * min(1.0, step / NUM_WARMUP_STEPS) * max(0.0, 1 - done)
        with _autocast(args.device):
            loss = compiled(model, *(part.to(args.device, non_blocking=True).long() for part in batch))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses += loss.detach()
        if step % every == 0 or done >= 1:
            _tell(step, done, losses / ((step - 1) % every + 1), begin)
            losses.zero_()
        if done >= 1:
            break


def _tell(step: int, done: float, loss: torch.Tensor, begin: float) -> None:
    say(f"step {step:,} ({done:.0%}): loss {loss.item():.5f}, {time.monotonic() - begin:.0f} s")
    sys.stdout.flush()


def _optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.98), fused=args.device == "cuda")


def _autocast(device: str) -> Any:  # noqa: ANN401 - torch's own class or the standard library's
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext()


def _loss(
    model: nn.Module, tokens_RW: torch.Tensor, documents_RW: torch.Tensor, targets_RW: torch.Tensor
) -> torch.Tensor:
    """Mean over the answers' tokens of what the right one costs."""
    logits_RWV = model(tokens_RW, attention_mask=document_mask(documents_RW), use_cache=False).logits
    return cross_entropy(logits_RWV.float().flatten(0, 1), targets_RW.flatten(), ignore_index=IGNORED)


def document_mask(documents_RW: torch.Tensor) -> torch.Tensor:
    """Who sees whom, (R, 1, W, W): what came before in the same document."""
    same_RWW = documents_RW[:, :, None] == documents_RW[:, None, :]
    return same_RWW.tril()[:, None]


def _scored(model: nn.Module, args: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    result = score(model.to(dtype), args.num_cases, args.seed, args.device)
    say(f"{dtype}: {json.dumps(result, indent=2)}")
    return result


if __name__ == "__main__":
    raise SystemExit(main())

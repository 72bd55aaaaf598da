"""The command `mlx-zoo`. Errors are one line on stderr and exit status 1; 2 is for wrong usage."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

import mlx_zoo
from mlx_zoo import registry
from mlx_zoo.catalogue import Checkpoint
from mlx_zoo.describe import Place
from mlx_zoo.errors import MLXZooError, legible
from mlx_zoo.hub import cache as store
from mlx_zoo.mapping import engine

if TYPE_CHECKING:
    from mlx_zoo.verify.cached import Verdict


def console() -> Console:
    """As wide as the terminal; wide enough for any table in a pipe."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


class Group(click.Group):
    """Turns what is expected to go wrong into one clear line."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if ctx.params.get("debug"):
                raise
            expected = isinstance(error, (MLXZooError, ValueError, OSError))
            text = str(error) if expected else f"{type(error).__name__}: {error} (see --debug)"
            raise click.ClickException(legible(text)) from error


class Legible(logging.Formatter):
    """Log records quote what strangers wrote."""

    def format(self, record: logging.LogRecord) -> str:
        return legible(super().format(record))


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(mlx_zoo.__version__)
def main(debug: bool) -> None:
    """Famous pretrained networks for Apple's MLX."""
    handler = logging.StreamHandler()
    handler.setFormatter(Legible("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)


# Shared options ---------------------------------------------------------------------------------

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")

PLACE = (
    click.option(
        "--cache-dir", type=click.Path(path_type=Path), help="Instead of the usual cache."
    ),
    click.option("--offline", is_flag=True, help="Never ask the network."),
    click.option("--revision", help="Branch, tag or commit of a hub repository."),
)
NETWORK = (
    click.option("--pretrained", type=click.Path(), help="Other weights of the same network."),
    click.option("--task", help="Which head, for text networks."),
    click.option("--num-classes", type=int, help="Another number makes a fresh head."),
    click.option("--in-chans", type=int, help="Channels of the images."),
    click.option("--img-size", type=int, help="Side of the images; positions are resampled."),
    click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"])),
    click.option("--quantize", type=int, metavar="BITS", help="Weights of so many bits."),
)

JOB = (
    click.option(
        "--output",
        type=click.Path(path_type=Path),
        help="Answer a whole folder of images, or file of texts, one a line, into this file "
        "(.jsonl; vectors: .npy, .safetensors). What was interrupted goes on.",
    ),
    click.option(
        "--on-error",
        type=click.Choice(["record", "stop"]),
        help="With --output: what to do about an input that cannot be read.  [default: record]",
    ),
    click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True),
)


def options(*groups: tuple[Callable[[Callable], Callable], ...]) -> Callable:
    """Several shared options at once, given to the command as keyword arguments."""

    def decorate(command: Callable) -> Callable:
        for option in reversed([option for group in groups for option in group]):
            command = option(command)
        return command

    return decorate


def load_options(*, pretrained: str | None, offline: bool, **same: Any) -> dict[str, Any]:
    """The command line's options as `mlx_zoo.load` takes them."""
    return {"pretrained": pretrained or True, "local_files_only": offline, **same}


def show(value: Any) -> None:
    from mlx_zoo.verify.report import plain

    click.echo(json.dumps(plain(value), indent=2, default=str, allow_nan=False))


# Commands ---------------------------------------------------------------------------------------


@main.command("list")
@click.argument("pattern", default="*")
@click.option("--pretrained", is_flag=True, help="Only names with published weights.")
@click.option("--family", help="An architecture: vit.")
@click.option("--task", help="For which there is a head: fill-mask.")
@click.option("--source", help="Whose weights: torchvision, timm, transformers.")
@click.option("--max-params", type=float, help="The most parameters: 25e6.")
@click.option("--families", is_flag=True, help="One row for each architecture instead.")
@click.option("--markdown", is_flag=True, help="A table in Markdown, as in the documentation.")
@as_json
def list_models(
    pattern: str, families: bool, markdown: bool, as_json: bool, **filters: Any
) -> None:
    """The models whose names match PATTERN ('resnet50*')."""
    names = mlx_zoo.list_models(pattern, **filters)
    if families or markdown:
        head = FAMILIES if families else MODELS
        rows = list(_families(names) if families else _models(names))
        if as_json:
            show([dict(zip(head, (x.strip("`") for x in row), strict=True)) for row in rows])
        elif markdown:
            lines = (head, ALIGNMENT[: len(head)], *rows)
            click.echo("\n".join(f"| {' | '.join(line)} |" for line in lines))
        else:
            table = Table(*head, box=None, pad_edge=False)
            for row in rows:
                table.add_row(*(Text(cell.strip("`")) for cell in row))
            console().print(table)
        return
    if as_json:
        show(names)
        return
    chosen = [f"--{k.replace('_', '-')} {v}" for k, v in filters.items() if v]
    click.echo("\n".join(names) if names else f"no model matches {' '.join([pattern, *chosen])}")


@main.command()
@click.argument("name", required=False)
@click.option("--system", is_flag=True, help="What MLX runs on here, and how fast.")
@options(PLACE)
@as_json
def info(name: str | None, system: bool, as_json: bool, revision, cache_dir, offline) -> None:
    """What is known of a model, or of this system."""
    if system or name is None:
        facts = _system()
    else:
        place = {"revision": revision, "cache_dir": cache_dir, "local_files_only": offline}
        checkpoint = mlx_zoo.info(name, **place)
        if as_json:
            show({**asdict(checkpoint), "num_params": registry.num_parameters(checkpoint)})
            return
        facts = _card(checkpoint)
    if as_json:
        show(facts)
        return
    _print_facts(facts)


@main.command()
@click.argument("name")
@options(NETWORK, PLACE)
@click.option("--verify", is_flag=True, help="Compare with the PyTorch original, once.")
@as_json
def load(name: str, as_json: bool, verify: bool, **chosen: Any) -> None:
    """Fetch, convert and keep a model's weights, so that they load at once."""
    import mlx.core as mx

    start = time.perf_counter()
    model = mlx_zoo.load(name, verify=verify, **load_options(**chosen))
    seconds = time.perf_counter() - start
    weights = engine.parameters(model).values()
    facts = {
        "name": model.checkpoint.name,
        "source": model.checkpoint.source,
        "revision": model.checkpoint.revision,
        "dialect": model.checkpoint.dialect,
        "licence": model.checkpoint.license,
        "parameters": engine.num_parameters(model),
        "bytes": sum(x.nbytes for x in weights),
        "dtype": ", ".join(sorted({str(x.dtype).split(".")[-1] for x in weights})),
        "device": str(mx.default_device()),
        "seconds": round(seconds, 3),
    }
    if as_json:
        show(facts)
    else:
        _print_facts({k: v for k, v in facts.items() if v is not None})


@main.command()
@click.argument("name")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Compare with the original; the report goes along.")
@click.option("--max-shard-size", default="5GB", show_default=True, help="Of a file of weights.")
@click.option("--upload-repo", metavar="ORG/NAME", help="Upload the folder to the hub, too.")
@click.option("--private", is_flag=True, help="With --upload-repo: for those with a token alone.")
@options(NETWORK, PLACE)
@as_json
def convert(
    name: str,
    folder: Path,
    as_json: bool,
    verify,
    max_shard_size,
    upload_repo,
    private,
    **chosen: Any,
) -> None:
    """Write a self-contained FOLDER, with a model card, that `local-dir:FOLDER` loads."""
    if private and upload_repo is None:
        raise click.UsageError("--private goes with --upload-repo")
    options = load_options(**chosen)
    path = mlx_zoo.convert(
        name,
        folder,
        options.pop("pretrained"),
        verify=verify,
        max_shard_size=max_shard_size,
        upload_repo=upload_repo,
        private=private,
        **options,
    )
    files = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
    uploaded = upload_repo and f"hf-hub:{upload_repo}"
    if as_json:
        show({"folder": str(path), "files": files, "uploaded": uploaded})
        return
    click.echo(legible(f"{path}: {', '.join(files)}\nload it with: local-dir:{path}"))
    if uploaded:
        click.echo(f"or from the hub with: {uploaded}")


def _list(kind: Callable[[str], Any]) -> Callable[[Any, Any, str | None], list[Any] | None]:
    """A callback for an option with values between commas."""

    def read(ctx: Any, param: Any, text: str | None) -> list[Any] | None:
        try:
            return None if text is None else [kind(word.strip()) for word in text.split(",")]
        except ValueError:
            raise click.BadParameter(f"{text!r}: numbers with commas between") from None

    return read


@main.command()
@click.argument("name")
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--dialect", help="Whose names to write: torchvision, timm, 'transformers, since 5', ..."
)
@click.option("--mlxfn", is_flag=True, help="The forward pass itself, whatever PATH ends in.")
@click.option("--batch", callback=_list(int), metavar="1,8,64", help="Of the .mlxfn.  [default: 1]")
@click.option("--length", callback=_list(int), metavar="64,128", help="Tokens of its texts.")
@click.option("--max-shard-size", default="5GB", show_default=True, help="Of a file of weights.")
@options(NETWORK, PLACE)
@as_json
def export(
    name: str,
    path: Path,
    dialect: str | None,
    mlxfn: bool,
    batch: list[int] | None,
    length: list[int] | None,
    max_shard_size: str,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Write a model for PyTorch, or its forward pass for C++ and Swift.

    PATH is a folder for the publisher's own library, one file of weights (.safetensors), or a
    function (.mlxfn).
    """
    is_function = mlxfn or path.suffix == ".mlxfn"
    given = [f"--{n}" for n, x in (("batch", batch), ("length", length)) if x]
    if given and not is_function:
        raise click.UsageError(f"{', '.join(given)}: of a function, PATH ends in .mlxfn then")
    if dialect and is_function:
        raise click.UsageError("--dialect: a function has none")
    model = mlx_zoo.load(name, **load_options(**chosen))
    if is_function:
        from mlx_zoo.exporting import export_function

        path = export_function(model, path, batch=batch or 1, length=length)
    else:
        path = mlx_zoo.export(model, path, dialect=dialect, max_shard_size=max_shard_size)
    files = sorted(x for x in path.rglob("*") if x.is_file()) if path.is_dir() else [path]
    sizes = {str(x.relative_to(path.parent)): x.stat().st_size for x in files}
    if as_json:
        show({"path": str(path), "bytes": sum(sizes.values()), "files": sizes})
        return
    for file, size in sizes.items():
        click.echo(legible(f"{path.parent / file}: {size:,} bytes"))


@main.command()
@click.argument("name", required=False)
@options(NETWORK, PLACE)
@click.option("--device", type=click.Choice(["cpu", "gpu"]), default="cpu", show_default=True)
@click.option("--size", type=int, help="Side of the images, or number of tokens.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--evidence",
    type=click.Choice(["original", "fingerprint", "published"]),
    help="Compare with this alone, not with the best that is at hand.",
)
@click.option("--gradients", is_flag=True, help="Every parameter's gradient against float64, too.")
@click.option("--all", "every", is_flag=True, help="With --local: every converted model.")
@click.option("--local", is_flag=True, help="With --all: what is in the cache, without network.")
@click.option(
    "--html",
    type=click.Path(path_type=Path),
    help="Write the report as a page, too; with --all, a page each into this folder.",
)
@as_json
def verify(
    name: str | None,
    as_json: bool,
    device,
    size,
    seed,
    evidence,
    gradients: bool,
    every: bool,
    local: bool,
    html: Path | None,
    **chosen: Any,
) -> None:
    """Compare a model with its PyTorch original, layer by layer. Exit status 1 if they differ."""
    if device == "gpu":  # MLX reads this once, at its first product there
        os.environ["MLX_ENABLE_TF32"] = "0"
    if every or local:
        _check_is_a_sweep(name, every, local, size, {"gradients": gradients, **chosen})
        _verify_all(as_json, html, chosen["cache_dir"], device=device, seed=seed, evidence=evidence)
        return
    if name is None:
        raise click.UsageError("Missing argument 'NAME', or --all --local for what is cached.")
    options = load_options(**chosen)
    report = mlx_zoo.verify(
        name,
        options.pop("pretrained"),
        device=device,
        size=size,
        seed=seed,
        evidence=evidence,
        gradients=gradients,
        **options,
    )
    if as_json:
        click.echo(report.to_json())
    else:
        console().print(report)
    if html:
        html.write_text(report.to_html(), encoding="utf-8")
    if not report.passed:
        sys.exit(1)


def _check_is_a_sweep(name, every: bool, local: bool, size, chosen: dict[str, Any]) -> None:
    if not local:
        count = sum(bool(c.source) for c in registry.checkpoints().values())
        raise click.UsageError(
            f"--all alone would download, convert and verify all {count} published models; "
            "--all --local verifies those in the cache"
        )
    said = [f"--{option.replace('_', '-')}" for option, value in chosen.items() if value]
    said = [option for option in said if option not in ("--cache-dir", "--offline")]
    said += ["NAME"] * (name is not None) + ["--size"] * (size is not None)
    if not every or said:
        reason = f"{', '.join(said)} would be ignored" if said else "--local goes with --all"
        raise click.UsageError(f"{reason}: `mlx-zoo verify --all --local` takes what is cached")


def _verify_all(as_json: bool, html: Path | None, cache_dir: Path | None, **how: Any) -> None:
    """A table of what is cached. Exit status 1 unless there is something, and all of it passed."""
    from mlx_zoo.verify import sweep

    found: list[Verdict] = []
    stopped = False
    if html:
        html.mkdir(parents=True, exist_ok=True)
    with Console(stderr=True).status("") as status:

        def begin(name: str) -> None:
            status.update(f"{len(found)} done, now {name}")

        try:
            for verdict in sweep(cache_dir, begin=begin, **how):
                found.append(verdict)
                if html and verdict.report:
                    page = html / f"{verdict.path.name}.html"
                    page.write_text(verdict.report.to_html(), encoding="utf-8")
        except KeyboardInterrupt:
            stopped = True
    passed = sum(verdict.passed for verdict in found)
    if as_json:
        rows = [verdict.to_json() for verdict in found]
        show({"passed": passed, "of": len(rows), "interrupted": stopped, "verdicts": rows})
    else:
        console().print(_verdicts(found))
        there = f"{passed} of {len(found)} passed" if found else "nothing is cached"
        stop = "; interrupted: the others were not verified" if stopped else ""
        click.echo(f"{there} in {store.cache_root(cache_dir)}{stop}")
    if stopped:
        sys.exit(130)
    if not found or passed < len(found):
        sys.exit(1)


def _verdicts(found: Sequence[Verdict]) -> Table:
    """One row for each entry that was verified, and why where it did not pass."""
    table = Table(box=None, pad_edge=False)
    for column in ("name", "source", "dtype", "verdict"):
        table.add_column(column, overflow="fold")
    for column in ("max |diff|", "x torch"):
        table.add_column(column, justify="right")
    table.add_column("evidence, or why not", overflow="fold")
    table.add_column("s", justify="right")
    for verdict in found:
        row = verdict.to_json()
        biggest, times = row["max_abs"], row["times_pytorch"]
        table.add_row(
            *(Text(legible(row[key])) for key in ("name", "source", "dtype")),
            Text(row["verdict"], style="green" if verdict.passed else "bold red"),
            "-" if biggest is None else f"{biggest:.1e}",
            "-" if times is None else f"{times:.2f}",
            Text(legible(row["evidence"] if verdict.passed else verdict.reason)),
            f"{verdict.seconds:.1f}",
        )
    return table


@main.command()
@click.argument("name")
@click.argument("inputs", nargs=-1)
@click.option("--top-k", type=click.IntRange(1), help="How many answers, where there are several.")
@click.option("--context", help="A text, or @FILE with one, that answers questions.")
@options(JOB, NETWORK, PLACE)
@as_json
def predict(
    name: str,
    inputs: tuple[str, ...],
    top_k: int | None,
    context,
    output: Path | None,
    on_error: str | None,
    batch_size: int,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Classify images or texts, find entities, fill masks, answer questions.

    INPUTS are the files of images, or texts; without any, the lines of standard input. With
    --output, one folder of images, or one file of texts. The task is that of the weights, or
    --task.
    """
    _check_is_a_job(output, on_error, inputs)
    inputs = inputs or tuple(sys.stdin.read().splitlines())
    if not inputs:
        raise click.UsageError("nothing to predict: give INPUTS, or lines on standard input")
    place = {"revision": chosen["revision"], "cache_dir": chosen["cache_dir"]}
    checkpoint = mlx_zoo.info(name, local_files_only=chosen["offline"], **place)
    task = chosen.pop("task") or _usual_task(checkpoint)
    run = mlx_zoo.pipeline(task, name, **load_options(**chosen))
    how: dict[str, Any] = {}
    if task == "token-classification":
        how["aggregation_strategy"] = "simple"
    elif top_k is not None:
        how["top_k"] = top_k
    if output is not None:
        _answer_all(run, inputs[0], output, on_error, as_json, batch_size=batch_size, **how)
        return
    questions: list[Any] = list(inputs)
    if context is not None and task != "question-answering":
        raise click.UsageError(f"--context is for question-answering, this is {task}")
    if task == "question-answering":
        if context is None:
            raise click.UsageError("question-answering needs --context")
        if context.startswith("@"):
            context = Path(context[1:]).read_text(encoding="utf-8")
        questions = [{"question": text, "context": context} for text in inputs]
    answers = run(questions, batch_size=batch_size, **how)
    if isinstance(answers, np.ndarray):  # a vector each
        answers = answers.tolist()
    if as_json:
        pairs = zip(inputs, answers, strict=True)
        show([{"input": text, "answer": answer} for text, answer in pairs])
        return
    for text, found in zip(inputs, answers, strict=True):
        click.echo(legible(text))
        for answer in found if isinstance(found, list) else [found]:
            click.echo(legible(_line(answer)))


def _check_is_a_job(output: Path | None, on_error: str | None, inputs: Sequence[str]) -> None:
    if output is None and on_error is not None:
        raise click.UsageError("--on-error goes with --output")
    if output is not None and len(inputs) != 1:
        raise click.UsageError("--output takes one folder of images, or one file of texts")


def _answer_all(
    run: Any, inputs: str, output: Path, on_error: str | None, as_json: bool, **how: Any
) -> None:
    """Long work into a file. Exit status 1 if an input failed."""
    from mlx_zoo.tasks.jobs import answer_all

    start = time.perf_counter()
    try:
        done = answer_all(run, inputs, output, on_error=on_error or "record", **how)
    except KeyboardInterrupt:
        click.echo(f"interrupted; the same command goes on with {output}", err=True)
        sys.exit(130)
    seconds = time.perf_counter() - start
    if done.rank:
        return
    if as_json:
        show({**asdict(done), "seconds": round(seconds, 3)})
    else:
        for input, reason in done.failures:
            click.echo(legible(f"{input}: {reason}"), err=True)
        if done.num_failed > len(done.failures):
            click.echo(f"and {done.num_failed - len(done.failures):,} more", err=True)
        new = done.num_inputs - done.num_before
        before = f", {done.num_before:,} of them before" if done.num_before else ""
        rate = f" ({new / seconds:,.1f}/s)" if new else ""
        click.echo(
            legible(
                f"{done.output}: {done.num_inputs:,} inputs{before}, "
                f"{done.num_failed:,} failed; {seconds:,.1f} s{rate}"
            )
        )
    if done.num_failed:
        sys.exit(1)


def _usual_task(checkpoint: Checkpoint) -> str:
    """What the weights are for, as a pipeline."""
    if registry.architectures()[checkpoint.architecture].inputs == "images":
        return "image-classification"
    task = {"pretraining": "fill-mask"}.get(checkpoint.task or "", checkpoint.task)
    if task is None:
        raise click.UsageError(f"{checkpoint.name} does not say what it is for: give --task")
    return task


def _line(answer: dict[str, Any] | list[dict[str, Any]] | float) -> str:
    """An answer of a pipeline in a line; of several masks, a line each."""
    if isinstance(answer, list):
        return "\n".join(map(_line, answer))
    if isinstance(answer, float):
        return f"  {answer:.6g}"
    shown = ("label", "entity_group", "word", "answer", "sequence", "generated_text")
    words = "  ".join(str(answer[key]) for key in shown if key in answer)
    where = f"  [{answer['start']}:{answer['end']}]" if answer.get("start") is not None else ""
    score = f"{answer['score']:7.2%}  " if "score" in answer else ""
    return f"  {score}{words}{where}"


@main.command()
@click.argument("name")
@click.argument("prompt", required=False)
@click.option("--max-tokens", type=click.IntRange(1), help="256, or as many as fit.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=int, default=0, help="Of the likeliest tokens; 0: all.")
@click.option("--top-p", type=float, default=1.0, help="Of the likeliest this much probability.")
@click.option("--min-p", type=float, default=0.0, help="Relative to the likeliest token.")
@click.option("--repetition-penalty", type=float, default=1.0)
@click.option("--stop", multiple=True, help="Text that ends the answer; may be given often.")
@click.option("--seed", type=int)
@options(NETWORK, PLACE)
@as_json
def generate(
    name: str,
    prompt: str | None,
    as_json: bool,
    max_tokens,
    temperature,
    top_k,
    top_p,
    min_p,
    repetition_penalty,
    stop,
    seed,
    **chosen: Any,
) -> None:
    """Continue PROMPT, or standard input, token by token."""
    prompt = sys.stdin.read() if prompt is None else prompt
    start = time.perf_counter()
    tokens = []
    for token in mlx_zoo.generate(
        mlx_zoo.load(name, **load_options(**chosen)),
        prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stop,
        seed=seed,
    ):
        tokens.append(token)
        if not as_json:
            click.echo(legible(token.text), nl=False)
    if not as_json:
        click.echo()
        return
    show(
        {
            "prompt": prompt,
            "text": "".join(token.text for token in tokens),
            "tokens": [token.token for token in tokens],
            "seconds": round(time.perf_counter() - start, 3),
        }
    )


@main.command()
@click.argument("name")
@click.argument("texts", nargs=-1)
@options(JOB, PLACE)
@as_json
def embed(
    name: str,
    texts: tuple[str, ...],
    output: Path | None,
    on_error: str | None,
    batch_size: int,
    as_json: bool,
    revision,
    cache_dir,
    offline,
) -> None:
    """Embed sentences; without TEXTS, the lines of standard input.

    With --output, TEXTS is one file of sentences, one a line.
    """
    _check_is_a_job(output, on_error, texts)
    place = {"revision": revision, "cache_dir": cache_dir, "local_files_only": offline}
    run = mlx_zoo.pipeline("sentence-embedding", name, **place)
    if output is not None:
        _answer_all(run, texts[0], output, on_error, as_json, batch_size=batch_size)
        return
    texts = texts or tuple(sys.stdin.read().splitlines())
    vectors: Any = run(list(texts), batch_size=batch_size)
    if as_json:
        show([{"text": t, "embedding": v.tolist()} for t, v in zip(texts, vectors, strict=True)])
        return
    for vector in vectors:
        click.echo(" ".join(f"{x:.6g}" for x in vector))


def _warmup(ctx: Any, param: Any, text: str) -> int | float:
    """Steps, or a part of all."""
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise click.BadParameter(f"{text!r}: steps as 100, or a part of all as 0.1") from None


COURSE = (  # of a training run
    click.option("--epochs", type=click.IntRange(1), default=3, show_default=True),
    click.option("--max-steps", type=click.IntRange(1), help="Stop there, whatever the epoch."),
    click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True),
    click.option("--accumulate", type=click.IntRange(1), default=1, help="Batches in a step."),
    click.option(
        "--optimizer", type=click.Choice(["adamw", "sgd"]), default="adamw", show_default=True
    ),
    click.option("--learning-rate", type=float, help="The optimiser's and method's, if not said."),
    click.option("--momentum", type=float, default=0.9, show_default=True, help="Of sgd."),
    click.option(
        "--betas", callback=_list(float), default="0.9,0.999", show_default=True, help="Of adamw."
    ),
    click.option("--weight-decay", type=float, default=0.01, show_default=True),
    click.option(
        "--schedule",
        type=click.Choice(["cosine", "linear", "constant"]),
        default="cosine",
        show_default=True,
        help="Of the learning rate, after the warm-up.",
    ),
    click.option(
        "--warmup", callback=_warmup, default="0.1", show_default=True, help="Steps, or a part."
    ),
    click.option(
        "--layer-decay", type=float, default=1.0, help="Learning rate by depth from the head."
    ),
    click.option(
        "--clip-norm", type=click.FloatRange(0), default=1.0, show_default=True, help="0: off."
    ),
    click.option(
        "--precision",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        default="float32",
        show_default=True,
    ),
    click.option("--augment/--no-augment", default=True, help="Vary images.  [default: yes]"),
    click.option("--no-flip", is_flag=True, help="Never mirror images: text, digits, maps."),
    click.option("--label-smoothing", type=float, default=0.0, show_default=True),
    click.option("--mixup", type=float, default=0.0, help="Alpha by which images are mixed."),
    click.option("--max-length", type=int, help="Tokens of a text."),
    click.option("--evaluate-every", type=click.IntRange(1), help="Steps; an epoch, if not said."),
    click.option("--patience", type=click.IntRange(1), help="Evaluations without a better one."),
    click.option("--monitor", help="The metric by which the best is known: accuracy, loss, ..."),
    click.option("--checkpoint-every", type=click.IntRange(1), help="Steps."),
    click.option("--seed", type=click.IntRange(0), default=0, show_default=True),
)


@main.command()
@click.argument("name")
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--val", metavar="DATA|PART", help="To evaluate with; 0.2: that part of DATA.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="A folder for checkpoints, log, curves and the model. What was interrupted goes on.",
)
@click.option("--task", help="What the network is to do, where the data may be for several.")
@click.option(
    "--method", default="full", show_default=True, help="What learns: full, head, last-N, lora."
)
@click.option("--rank", type=click.IntRange(1), help="Of --method lora.")
@options(COURSE)
@as_json
def finetune(
    name: str, data: Path, val: str | None, method: Any, rank, as_json: bool, **chosen: Any
) -> None:
    """Train a pretrained network with DATA of your own.

    DATA is a folder with a folder of images for each class, a .csv or .jsonl file with the columns
    text, label (or image, label), or, for language models, a .txt file or a folder of them. The
    head is made for the classes of the data. The same command with the same --output goes on where
    it was interrupted.
    """
    from mlx_zoo.backend.processes import Crew
    from mlx_zoo.training import Augmentation, LoRA

    if rank is not None and method != "lora":
        raise click.UsageError("--rank goes with --method lora")
    if chosen.pop("no_flip") and chosen["augment"]:
        chosen["augment"] = Augmentation(flip=0.0)
    chosen["clip_norm"] = chosen["clip_norm"] or None
    chosen["betas"] = tuple(chosen["betas"])
    method = LoRA(rank=rank) if rank else method
    result = mlx_zoo.finetune(name, data, _part_or_data(val), method=method, **chosen)
    if Crew().rank:  # the first process tells
        return
    facts = {
        "name": name,
        "task": result.model.checkpoint.task,
        "steps": result.history[-1]["step"],
        "learning_rate": result.learning_rate,
        "train_loss": result.history[-1]["loss"],
        **result.metrics,
        "output": result.output and str(result.output),
    }
    if as_json:
        show(facts)
        return
    console().print(Text(legible(str(result))))
    if result.output is not None:
        click.echo(legible(f"use it: {_use(result)}"))


def _part_or_data(val: str | None) -> float | Path | None:
    """A number is a part, unless there is a file of that name."""
    if val is None or Path(val).expanduser().exists():
        return None if val is None else Path(val)
    try:
        return float(val)
    except ValueError:
        return Path(val)


def _use(result: Any) -> str:
    """The command that uses what was trained."""
    task = registry.of_model(result.model)
    folder = shlex.quote(f"local-dir:{result.output / 'model'}")
    if task.inputs == "images":
        return f"mlx-zoo predict {folder} image.png"
    if result.model.config.task == "text-generation":
        return f"mlx-zoo generate {folder} 'a beginning'"
    return f"mlx-zoo predict {folder} 'a text'"


@main.group()
def cache() -> None:
    """The converted weights that are kept."""


@cache.command("list")
@click.option("--cache-dir", type=click.Path(path_type=Path))
@as_json
def cache_list(cache_dir: Path | None, as_json: bool) -> None:
    """What is there."""
    root = store.cache_root(cache_dir)
    entries = list(store.entries(root))
    downloads = store.downloads(root)
    if as_json:
        rows = [
            {"path": str(e.path), **e.manifest, "verification": e.verification} for e in entries
        ]
        show(rows)
        return
    table = Table(box=None, pad_edge=False)
    for column in ("name", "source", "made", "MB", "verified"):
        table.add_column(column, justify="right" if column == "MB" else "left", overflow="fold")
    for entry in entries:
        said = entry.manifest.get("checkpoint")
        name = str(said.get("name") if isinstance(said, dict) else entry.path.name)
        done = entry.verification
        verdict = "-" if done is None else ("yes" if done.get("passed") else "FAILED")
        made = str(entry.manifest.get("created", ""))[:10]
        source = str(entry.manifest.get("source"))
        table.add_row(
            Text(legible(name)), Text(legible(source)), made, f"{entry.size / 1e6:.1f}", verdict
        )
    console().print(table)
    click.echo(f"{len(entries)} in {root}")
    if downloads:
        total = sum(size for _, size in downloads)
        click.echo(f"and {len(downloads)} downloaded files, {total / 1e6:.1f} MB")


@cache.command("verify")
@click.option("--cache-dir", type=click.Path(path_type=Path))
@as_json
def cache_verify(cache_dir: Path | None, as_json: bool) -> None:
    """Hash every entry again. Exit status 1 if one is damaged."""
    problems = {}
    entries = list(store.entries(store.cache_root(cache_dir)))
    for entry in entries:
        try:
            store.check(entry)
        except (MLXZooError, OSError) as error:
            problems[str(entry.path)] = str(error)
    if as_json:
        show({"checked": len(entries), "damaged": problems})
    else:
        for path, problem in problems.items():
            click.echo(legible(f"{path}: {problem}"), err=True)
        click.echo(f"{len(entries) - len(problems)} of {len(entries)} are whole")
    if problems:
        sys.exit(1)


@cache.command("prune")
@click.option("--cache-dir", type=click.Path(path_type=Path))
@click.option(
    "--days", type=click.FloatRange(0), help="Also entries and downloads older than this; 0: all."
)
@as_json
def cache_prune(cache_dir: Path | None, days: float | None, as_json: bool) -> None:
    """Remove what was set aside or left unfinished, and with --days old entries."""
    removed = [str(path) for path in store.prune(store.cache_root(cache_dir), days)]
    if as_json:
        show(removed)
    else:
        click.echo("\n".join([*removed, f"{len(removed)} removed"]))


@main.command()
@click.option("--device", type=click.Choice(["cpu", "gpu"]), default="cpu", show_default=True)
@click.option("--only", metavar="PATTERN", help="Of operations: 'conv*'.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--markdown", is_flag=True, help="Tables in Markdown, as in CONFORMANCE.md.")
@as_json
def conformance(as_json: bool, markdown: bool, device, only, seed) -> None:
    """Compare MLX's operations with PyTorch's. Exit status 1 if one differs and is not known to."""
    os.environ["MLX_ENABLE_TF32"] = "0"  # MLX reads this once, at its first product on the GPU
    from mlx_zoo.verify.conformance import run

    with Console(stderr=True).status("") as status:  # a GPU compiles its kernels: minutes
        report = run(device, only, seed, begin=lambda name: status.update(f"now {name}"))
    if as_json:
        click.echo(report.to_json())
    elif markdown:
        click.echo(report.to_markdown())
    else:
        console().print(report)
    if not report.passed:
        sys.exit(1)


@main.command()
@click.argument("name")
@click.option("--batch", callback=_list(int), default="1", show_default=True, metavar="1,8,64")
@click.option("--length", type=int, help="Tokens of a text.")
@click.option("--img-size", type=int, help="Side of the images.")
@click.option(
    "--dtype",
    callback=_list(str),
    default="float32",
    show_default=True,
    metavar="TYPES",
    help="Of float32, float16, bfloat16.",
)
@click.option("--device", type=click.Choice(["cpu", "gpu"]), help="MLX's default, if not said.")
@click.option(
    "--compare",
    callback=_list(str),
    metavar="WITH",
    help="torch: all of eager, compiled, channels-last; or some of them; mlx-lm; none.",
)
@click.option("--task", help="Which head, for text networks.")
@click.option(
    "--phase", "phases", callback=_list(str), metavar="PHASES", help="Of forward, prefill, decode."
)
@click.option("--new-tokens", type=int, default=64, show_default=True, help="Decoded in a run.")
@click.option("--sweep", type=click.Choice(["batch", "length"]), help="By powers of two.")
@click.option("--rounds", type=int, default=5, show_default=True, help="Turns of each framework.")
@click.option("--seconds", type=float, default=0.5, show_default=True, help="Of a turn, at least.")
@click.option("--threads", type=int, help="Of every library; all cores, if not said.")
@click.option("--optimize/--no-optimize", default=True, help="Ours for inference, too.")
@click.option("--loading/--no-loading", default=True, help="How long it takes to load, too.")
@click.option("--tf32/--no-tf32", default=True, help="Of float32 products on a GPU.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write an SVG, too.")
@as_json
def benchmark(name: str, as_json: bool, plot: Path | None, **chosen: Any) -> None:
    """Time a network beside its PyTorch original, in alternating rounds; random weights serve."""
    from mlx_zoo.benchmark import benchmark as run

    if plot and not plot.expanduser().absolute().parent.is_dir():  # before the work, not after it
        raise click.UsageError(f"--plot {plot}: there is no such folder")
    with Console(stderr=True).status("") as status:
        result = run(name, begin=lambda what: status.update(f"now {what}"), **chosen)
    if as_json:
        click.echo(result.to_json())
    else:
        console().print(result)
    if plot:
        result.save_plot(plot)


@main.command()
@as_json
def demo(as_json: bool) -> None:
    """Load, verify and run the bundled network: no network access, no PyTorch needed."""
    from mlx_zoo.demo import run

    sys.exit(0 if run(console(), as_json) else 1)


# What is shown ----------------------------------------------------------------------------------


def _card(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint as the lines of a model card."""
    architecture = registry.architectures()[checkpoint.architecture]
    facts: dict[str, Any] = {
        "name": checkpoint.name,
        "architecture": architecture.name,
        "paper": architecture.paper,
        "source": checkpoint.source,
        "revision": checkpoint.revision or _revision_policy(checkpoint),
        "sha256": checkpoint.sha256
        and checkpoint.sha256 + ("..." if len(checkpoint.sha256) < 64 else ""),
        "licence": checkpoint.license
        and checkpoint.license + (": no commercial use" if checkpoint.is_non_commercial else ""),
        "parameters": f"{registry.num_parameters(checkpoint):,}",
        "task": checkpoint.task,
        "other tasks": ", ".join(architecture.also.get(checkpoint.task, ())),
        "accuracy": ", ".join(
            f"{k.replace('acc', 'top-')} {v:.2f} %" for k, v in checkpoint.accuracy.items()
        ),
    }
    if how := checkpoint.preprocessing:
        cut = {"center": "centre crop", "squash": "squashed", "border": "with a border"}
        facts["input"] = (
            f"{_sides(how.size)}, from {_sides(how.resize)} by {how.interpolation}, "
            f"{cut[how.crop_mode]}; "
            f"mean {', '.join(map(str, how.mean))}; std {', '.join(map(str, how.std))}"
        )
    if names := checkpoint.labels:
        facts["labels"] = f"{len(names)}: {', '.join(names[:5])}{', ...' if names[5:] else ''}"
    if checkpoint.reference:
        facts["original"] = f"{checkpoint.reference.library} {checkpoint.reference.name}".strip()
    if checkpoint.source:
        known = checkpoint.name in registry.checkpoints()
        name = checkpoint.name if known else checkpoint.source
        facts["load it with"] = f'mlx_zoo.load("{name}", pretrained=True)'
    return {name: fact for name, fact in facts.items() if fact}


def _sides(size: int | tuple[int, int]) -> str:
    return f"{size} x {size}" if isinstance(size, int) else f"{size[0]} x {size[1]}"


def _revision_policy(checkpoint: Checkpoint) -> str | None:
    if not checkpoint.source.startswith("hf-hub:") or "@" in checkpoint.source:
        return None
    return "the newest at the first load, then that commit"


MODELS = ("model", "parameters", "checkpoints", "top-1", "licence", "original")
FAMILIES = ("family", "networks", "checkpoints", "of", "parameters", "tasks")
ALIGNMENT = ("---", "---:", "---:", "---", "---", "---")


def _models(names: list[str]) -> Iterator[tuple[str, ...]]:
    """One row for each bare name that has published weights."""
    tags = Counter(c.variant for c in registry.checkpoints().values())
    for name in names:
        checkpoint = mlx_zoo.info(name)
        if not checkpoint.default or name != checkpoint.variant:
            continue
        accuracy = checkpoint.accuracy.get("acc1")
        yield (
            f"`{name}`",
            f"{registry.num_parameters(checkpoint) / 1e6:.1f} M",
            str(tags[name]),
            f"{accuracy:.1f} %" if accuracy else "",
            checkpoint.license or "",
            registry.publisher(checkpoint),
        )


def _families(names: list[str]) -> Iterator[tuple[str, ...]]:
    """One row for each architecture."""
    published = {c.name: c for name in names if (c := mlx_zoo.info(name)).source}
    for name, architecture in registry.architectures().items():
        own = [c for c in published.values() if c.architecture == name]
        if not own:
            continue
        sizes = [registry.num_parameters(c) / 1e6 for c in own]
        publishers = Counter(map(registry.publisher, own))
        yield (
            f"`{name}`",
            str(len({c.variant for c in own})),
            str(len(own)),
            ", ".join(f"{publisher} {count}" for publisher, count in publishers.items()),
            f"{min(sizes):.1f} M to {max(sizes):,.0f} M",
            ", ".join(architecture.tasks),
        )


def _system() -> dict[str, Any]:
    import platform
    from importlib.metadata import version
    from importlib.util import find_spec

    import mlx.core as mx

    from mlx_zoo.backend import blas

    library = blas.load_fast_blas()
    return {
        "mlx_zoo": mlx_zoo.__version__,
        "mlx": version("mlx"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": str(mx.default_device()),
        "blas": " ".join(filter(None, (library.name, library.path and f"({library.path})"))),
        "note": library.note,
        "float32 matmul on the CPU": f"{blas.measure_gflops():.0f} GFLOP/s",
        "cache": str(Place().root),
        "PyTorch originals": ", ".join(
            name for name in ("torch", "torchvision", "timm", "transformers") if find_spec(name)
        )
        or "not installed: pip install 'mlx-zoo[torch]' to verify against them",
    }


def _print_facts(facts: dict[str, Any]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, fact in facts.items():
        if fact not in (None, ""):
            table.add_row(name, Text(f"{fact:,}" if isinstance(fact, int) else legible(str(fact))))
    console().print(table)

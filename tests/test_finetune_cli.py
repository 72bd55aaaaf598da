"""`mlx-zoo finetune` from end to end: on pictures that are drawn here, on tables, on a text."""

import json
import os
import subprocess
import sys

import mlx_zoo  # isort: skip  # before mlx.core
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image, ImageDraw, ImageFont

from mlx_zoo.cli import main


def mlx_zoo_does(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def draw(letter, rng):
    image = Image.new("L", (32, 32), 0)
    place = tuple(rng.integers((3, 0), (9, 5)).tolist())
    font = ImageFont.load_default(int(rng.integers(22, 27)))
    ImageDraw.Draw(image).text(place, letter, fill=255, font=font)
    return image


@pytest.fixture
def letters(tmp_path):
    """A folder of pictures of letters, in a folder each."""
    rng = np.random.default_rng(0)
    for letter in "TXO":
        folder = tmp_path / "letters" / letter
        folder.mkdir(parents=True)
        for i in range(20):
            draw(letter, rng).save(folder / f"{i}.png")
    return tmp_path / "letters"


def test_pictures_are_learnt_and_the_result_is_used_as_it_says(letters, tmp_path):
    out = tmp_path / "out"
    command = ("finetune", "resnet_digits", letters, "--val", "0.25", "--output", out)
    command += ("--epochs", "8", "--batch-size", "15", "--learning-rate", "0.003")
    done = mlx_zoo_does(*command)
    assert done.exit_code == 0, done.output
    assert (
        done.stdout.splitlines()[-1] == f"use it: mlx-zoo predict local-dir:{out}/model image.png"
    )
    history = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in history] == [*range(1, 25)]
    assert "accuracy" in (out / "curves.svg").read_text()

    again = mlx_zoo_does(*command, "--json")  # it is finished: nothing is trained
    assert again.exit_code == 0, again.output
    facts = json.loads(again.stdout)
    assert facts["steps"] == 24
    assert facts["accuracy"] == max(row.get("val_accuracy", 0) for row in history)
    assert facts["accuracy"] > 0.85

    files = [letters / letter / "3.png" for letter in "TXO"]
    said = mlx_zoo_does("predict", f"local-dir:{out}/model", *files, "--top-k", "1", "--json")
    assert said.exit_code == 0, said.output
    assert [row["answer"][0]["label"] for row in json.loads(said.stdout)] == ["T", "X", "O"]

    other = mlx_zoo_does(*command, "--seed", "1")
    assert other.exit_code == 1
    assert "seed" in other.output


def test_a_table_of_texts_with_adapters(tmp_path):
    table, val = tmp_path / "train.csv", tmp_path / "val.jsonl"
    rows = [(f"return the array of {i} values", "array") for i in range(12)]
    rows += [(f"a graph with {i} nodes", "graph") for i in range(12)]
    table.write_text("text,label\n" + "".join(f'"{text}",{label}\n' for text, label in rows))
    val.write_text("".join(json.dumps({"text": t, "label": n}) + "\n" for t, n in rows[::5]))
    words = ("--method", "lora", "--rank", "4", "--learning-rate", "0.01", "--max-length", "16")
    out = tmp_path / "out"
    done = mlx_zoo_does(
        "finetune", "bert_docs", table, "--val", val, "--output", out, "--epochs", "6", *words,
        "--batch-size", "8", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["accuracy"] == 1
    said = mlx_zoo_does("predict", f"local-dir:{out}/model", "a graph with 99 nodes", "--json")
    assert json.loads(said.stdout)[0]["answer"]["label"] == "graph"


def test_a_text_is_learnt_by_a_language_model(tmp_path):
    (tmp_path / "a.txt").write_text("Return the array, then raise an error.\n" * 60)
    done = mlx_zoo_does(
        "finetune", "gpt2_docs", tmp_path / "a.txt", "--val", tmp_path / "a.txt", "--epochs", "2",
        "--max-length", "32", "--batch-size", "4", "--learning-rate", "0.005", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["perplexity"] < 3
    assert facts["output"] is None


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("nothing_here",), 1, "no model is called"),
        (("resnet_digits", "none"), 1, "none: no such file or folder"),
        (("resnet_digits", "bad.csv"), 1, "bad.csv, line 3: 1 cells, the header has 2"),
        (("resnet_digits", "texts.csv"), 1, "text-classification"),
        (("resnet_digits", "images.csv", "--val", "1.5"), 1, "val_data=1.5"),
        (("resnet_digits", "images.csv", "--val", "away"), 1, "away: no such file"),
        (("resnet_digits", "images.csv", "--method", "some"), 1, "method='some'"),
        (("resnet_digits", "images.csv", "--max-length", "9"), 1, "max_length=9"),
        (("resnet_digits", "images.csv", "--betas", "0.9"), 1, "betas=(0.9,)"),
        (("resnet_digits", "images.csv", "--monitor", "loss"), 1, "give val_data"),
        (("resnet_digits", "images.csv", "--rank", "4"), 2, "--rank goes with --method lora"),
        (("resnet_digits", "images.csv", "--warmup", "soon"), 2, "'soon': steps as 100"),
        (("resnet_digits", "images.csv", "--epochs", "0"), 2, "--epochs"),
        (("resnet_digits",), 2, "Missing argument 'DATA'"),
    ],
)
def test_what_goes_wrong_is_one_line(words, status, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw("X", np.random.default_rng(0)).save("x.png")
    for name, text in (
        ("images.csv", "image,label\nx.png,a\nx.png,b\n"),
        ("texts.csv", "text,label\nx,a\ny,b\n"),
        ("bad.csv", "image,label\nx.png,a\nx.png\n"),
    ):
        (tmp_path / name).write_text(text)
    if words == ("nothing_here",):
        words = (*words, "images.csv")
    done = mlx_zoo_does("finetune", *words)
    assert done.exit_code == status, done.output
    assert message in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1
    assert "Traceback" not in done.output


def test_the_options_reach_the_function(monkeypatch, tmp_path):
    """Each as it was said; what was not said is what the function itself does."""
    import inspect

    from mlx_zoo.training import Augmentation, LoRA

    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(mlx_zoo.finetune).parameters.items()
    }
    given = {}

    def finetune(model, train_data, val_data=None, **options):
        given.update(options)
        raise ValueError("enough")

    monkeypatch.setattr(mlx_zoo, "finetune", finetune)
    mlx_zoo_does("finetune", "resnet_digits", tmp_path)
    assert given == {name: defaults[name] for name in given}
    left = {"model", "train_data", "val_data", "progress"}
    assert given.keys() == defaults.keys() - left
    mlx_zoo_does(
        "finetune", "resnet_digits", tmp_path, "--method", "lora", "--rank", "3",
        "--clip-norm", "0", "--warmup", "10", "--betas", "0.8,0.9", "--no-flip",
        "--optimizer", "sgd",
    )  # fmt: skip
    assert given["method"] == LoRA(rank=3)
    assert given["augment"] == Augmentation(flip=0.0)
    assert (given["clip_norm"], given["warmup"], given["betas"]) == (None, 10, (0.8, 0.9))
    assert given["optimizer"] == "sgd"
    mlx_zoo_does("finetune", "resnet_digits", tmp_path, "--no-augment", "--no-flip")
    assert given["augment"] is False


def test_the_module_is_the_command(letters, tmp_path):
    words = ("finetune", "resnet_digits", str(letters), "--max-steps", "1", "--json")
    done = subprocess.run(
        [sys.executable, "-m", "mlx_zoo", *words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"MLX_ZOO_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 1

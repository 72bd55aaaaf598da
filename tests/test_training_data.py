"""Data for training: what is read, what is refused, and that every batch follows from the seed."""

import itertools
import json
import math
import time

import mlx_zoo  # isort: skip  # before mlx.core
import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from mlx_zoo.errors import MLXZooError
from mlx_zoo.training import texts
from mlx_zoo.training.augmentation import Augmentation, soft_labels
from mlx_zoo.training.data import hold_out, inspect, training_data, validation_data
from mlx_zoo.training.images import preprocessing_of
from mlx_zoo.training.losses import IGNORED
from mlx_zoo.verify.reference import import_torchvision

torchvision = import_torchvision()


@pytest.fixture(scope="module")
def networks():
    """By task; the fixture of the cache is for a test alone, and these are the package's own."""
    return {
        "images": mlx_zoo.load("resnet_digits", pretrained=True),
        "texts": mlx_zoo.load(
            "bert_docs_topic", pretrained=True, task="text-classification", num_classes=2
        ),
        "tags": mlx_zoo.load("bert_docs_code", pretrained=True, task="token-classification"),
        "gpt2": mlx_zoo.load("gpt2_docs", pretrained=True),
        "masks": mlx_zoo.load("bert_docs", pretrained=True, task="fill-mask"),
    }


def picture(seed, size=(40, 30), mode="L"):
    shape = (size[1], size[0]) + ((3,) if mode == "RGB" else ())
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def folder_of_images(folder, classes=("cat", "dog"), count=3):
    for k, name in enumerate(classes):
        for i in range(count):
            file = folder / name / ("deep" if i == 1 else "") / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture(10 * k + i).save(file)
    return folder


def arrays(count=20, classes=10):
    images = np.random.default_rng(0).integers(0, 256, (count, 36, 32), np.uint8)
    return images, np.arange(count) % classes


def bits(batches):
    return [tuple(map(np.array, (*b.inputs, b.targets))) for b in batches]


def same(a, b):
    """Whether two lists of batches have the same bits."""
    pairs = [pair for x, y in zip(a, b, strict=True) for pair in zip(x, y, strict=True)]
    return len(a) > 0 and all(np.array_equal(x, y) for x, y in pairs)


# Images -----------------------------------------------------------------------------------------


def test_a_folder_is_read_as_torchvision_reads_it(tmp_path, caplog):
    folder = folder_of_images(tmp_path / "data", ("b", "a", "10", "9"))
    (folder / "a" / ".hidden.png").write_bytes(b"none")
    (folder / "a" / "notes.txt").write_text("no image")
    theirs = torchvision.datasets.ImageFolder(folder, is_valid_file=lambda p: p.endswith("0.png"))
    found = inspect(folder)
    assert found.task == "image-classification"
    # Numbers among names are names.
    assert list(found.labels) == theirs.classes == ["10", "9", "a", "b"]
    own = {str(p): t for p, t in zip(found.inputs, found.targets, strict=True)}
    assert len(own) == 12
    for path, index in theirs.samples:
        assert own[path] == theirs.classes[index]
    assert "1 files that are no images" in caplog.text


def broken(folder):
    (folder / "cat" / "bad.png").write_bytes(b"not a picture")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "empty").mkdir(), "empty: no image"),
        (lambda f: picture(0).save(f / "loose.png"), "loose.png is in no folder of a class"),
        (broken, r"1 of 7 images cannot be read\n.*cat/bad.png"),
        (lambda f: (f / "dog").rename(f.parent / "away"), "a single class"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said_before_training(tmp_path, networks, change, message):
    folder = folder_of_images(tmp_path / "data")
    change(folder)
    model = mlx_zoo.load("resnet_digits", num_classes=2)
    with pytest.raises(ValueError, match=message):
        training_data(folder, model)


def test_a_folder_of_parts_is_no_folder_of_classes(tmp_path):
    folder_of_images(tmp_path / "data", ("train", "val"))
    with pytest.raises(ValueError, match="train, val: give one of them"):
        inspect(tmp_path / "data")


def test_a_picture_that_ends_early_is_named_when_it_is_read(tmp_path):
    folder = folder_of_images(tmp_path / "data")
    file = folder / "dog" / "0.png"
    file.write_bytes(file.read_bytes()[:-400])
    data = training_data(folder, mlx_zoo.load("resnet_digits", num_classes=2))
    with pytest.raises(ValueError, match=r"dog/0\.png"):
        list(data.batches(0, 4))


def test_without_augmentation_an_image_is_as_the_checkpoint_wants_it(networks):
    model = networks["images"]
    images, ids = arrays(7)
    (batch,) = validation_data((images, ids), model).batches(0, 7)
    assert np.array_equal(batch.inputs[0], preprocessing_of(model)([*images]))
    assert batch.targets.tolist() == ids.tolist()


def test_crops_are_distributed_as_torchvisions(cache):
    import torch

    torch.manual_seed(0)
    rng, ours = np.random.default_rng(0), Augmentation()
    image = torch.zeros(1, 180, 240)
    crop = torchvision.transforms.RandomResizedCrop.get_params
    theirs = np.array([crop(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)])
    own = np.array([ours.crop(240, 180, rng) for _ in range(4000)])[:, [1, 0, 3, 2]]
    for value in (
        lambda x: x[:, 2] * x[:, 3],  # area
        lambda x: x[:, 3] / x[:, 2],  # aspect ratio
        lambda x: x[:, 0] / (181 - x[:, 2]),  # where it begins
        lambda x: x[:, 1] / (241 - x[:, 3]),
    ):
        assert stats.ks_2samp(value(own), value(theirs)).pvalue > 0.01


def test_crops_reach_every_edge():
    three_of_four = Augmentation(scale=(9 / 16, 9 / 16), ratio=(1, 1))
    rng = np.random.default_rng(0)
    found = {three_of_four.crop(4, 4, rng) for _ in range(100)}
    assert found == {(left, top, 3, 3) for left in (0, 1) for top in (0, 1)}


@pytest.mark.parametrize("size", [(300, 50), (50, 300), (120, 100)])
def test_where_no_crop_fits_it_is_the_middle_as_torchvisions(size):
    import torch

    for ratio in ((1.0, 1.0), (3 / 4, 4 / 3)):
        top, left, h, w = torchvision.transforms.RandomResizedCrop.get_params(
            torch.zeros(1, size[1], size[0]), [1.0, 1.0], ratio
        )
        own = Augmentation(scale=(1.0, 1.0), ratio=ratio).crop(*size, np.random.default_rng(0))
        if ratio == (1.0, 1.0) or max(size) > 2 * min(size):
            assert own == (left, top, w, h)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_an_augmented_image_has_torchvisions_pixels(interpolation):
    image, seed = picture(1, (61, 47), "RGB"), 5
    ours = Augmentation(flip=1.0)
    left, top, w, h = ours.crop(61, 47, np.random.default_rng(seed))
    F = torchvision.transforms.functional
    mode = torchvision.transforms.InterpolationMode(interpolation)
    theirs = F.hflip(F.resized_crop(image, top, left, h, w, (24, 32), mode))
    own = ours(image, (24, 32), interpolation, np.random.default_rng(seed))
    assert np.array_equal(own, theirs)


def test_colours_move_by_the_factors_that_were_drawn():
    image, jitter = picture(1, (20, 20), "RGB"), 0.4
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "flip": 0.0}
    rng = np.random.default_rng(3)
    own = Augmentation(**whole, jitter=jitter)(image, (20, 20), "bilinear", rng)
    rng = np.random.default_rng(3)
    Augmentation(**whole)(image, (20, 20), "bilinear", rng)
    F, seen = torchvision.transforms.functional, image
    for change in (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation):
        seen = change(seen, rng.uniform(0.6, 1.4))
    assert np.array_equal(own, seen)
    assert not np.array_equal(own, image)


def test_photographs_are_mirrored_and_grey_images_are_not():
    assert Augmentation.usual(3) == Augmentation()
    assert Augmentation.usual(3).flip == 0.5
    assert Augmentation.usual(1).flip == 0


@pytest.mark.parametrize(
    "wrong", [{"scale": (0, 1)}, {"scale": (0.5, 0.2)}, {"ratio": (2, 1)}, {"flip": 1.1}]
)
def test_an_augmentation_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Augmentation(**wrong)


def test_mixed_images_and_labels_are_mixed_alike(networks):
    """What is mixed is found again: images whose every pixel is their label."""
    values = np.arange(10, dtype=np.uint8) * 25
    images = np.broadcast_to(values[:, None, None], (10, 32, 32))
    model = networks["images"]
    data = training_data((images, np.arange(10)), model, augment=False, mixup=1.0)
    how = preprocessing_of(model)
    shares = []
    for epoch in range(20):
        (batch,) = data.batches(epoch, 10)
        soft = np.array(batch.targets)
        assert np.allclose(soft.sum(axis=1), 1)
        wanted = (soft @ values / 255 - how.mean[0]) / how.std[0]
        assert np.abs(np.array(batch.inputs[0])[:, 0, 0, 0] - wanted).max() < 1e-4
        shares += [soft.max(axis=1).min()]
    assert min(shares) < 0.7 < 0.9 < max(shares)  # Beta(1, 1): any share


def test_smoothed_labels():
    found = soft_labels(np.array([2, 0]), 4, 0.1)
    assert np.allclose(found, [[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]])


# Order and chance -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"mixup": 0.4, "label_smoothing": 0.1}])
def test_the_same_epoch_is_the_same_wherever_it_begins_and_in_any_number_of_processes(
    networks, options
):
    data = training_data(arrays(23), networks["images"], seed=3, **options)
    assert data.num_batches(8) == 3
    whole = bits(data.batches(1, 8))
    assert [len(x) for x, _ in whole] == [8, 8, 7]
    assert same(whole, bits(data.batches(1, 8)))
    assert same(whole[2:], bits(data.batches(1, 8, start=2)))
    parts = [bits(data.batches(1, 8, part=(rank, 3))) for rank in range(3)]
    for number, (images, targets) in enumerate(whole):
        for rank in range(3):
            assert np.array_equal(parts[rank][number][0], images[rank::3])
            assert np.array_equal(parts[rank][number][1], targets[rank::3])
    again = training_data(arrays(23), networks["images"], seed=3, **options)
    assert same(whole, bits(again.batches(1, 8)))
    assert again.digest == data.digest
    other = training_data(arrays(23), networks["images"], seed=4, **options)
    for batches in (data.batches(2, 8), other.batches(1, 8)):
        assert not same(whole, bits(batches))


def test_each_epoch_sees_every_example_once_in_another_order(networks):
    images = np.broadcast_to(np.arange(20, dtype=np.uint8)[:, None, None], (20, 32, 32))
    data = training_data((images, np.arange(20) % 10), networks["images"], augment=False)
    orders = []
    for epoch in (0, 1):
        seen = np.concatenate([x[:, 0, 0, 0] for x, _ in bits(data.batches(epoch, 8))])
        how = preprocessing_of(networks["images"])
        orders.append(np.round((seen * how.std[0] + how.mean[0]) * 255).astype(int).tolist())
        assert sorted(orders[-1]) == [*range(20)]
    assert orders[0] != orders[1]


def test_a_process_without_a_row_has_an_empty_part(networks):
    data = training_data(arrays(9), networks["images"])
    *_, last = data.batches(0, 8, part=(1, 2))
    assert last == ((), None, 0)


def test_the_digest_knows_data_and_options(networks, tmp_path):
    model = networks["images"]
    images, ids = arrays()
    changed = images.copy()
    changed[3, 4, 5] ^= 1
    digests = [
        training_data(data, model, **options).digest
        for data, options in (
            ((images, ids), {}),
            ((changed, ids), {}),
            ((images, ids[::-1]), {}),
            ((images, ids), {"seed": 1}),
            ((images, ids), {"mixup": 0.1}),
            ((images, ids), {"augment": Augmentation(flip=0.1)}),
        )
    ]
    assert len(set(digests)) == len(digests)


def test_batches_are_prepared_ahead_and_streams_are_not_read_beyond(networks):
    taken = 0

    class Endless:
        def __iter__(self):
            nonlocal taken
            for i in itertools.count():
                taken += 1
                yield np.full((32, 32), i % 250, np.uint8), i % 10

    data = training_data(Endless(), networks["images"])
    assert data.num_examples is None
    assert data.num_batches(4) is None
    batches = data.batches(0, 4)
    first = [next(batches) for _ in range(3)]
    assert taken <= 4 * 8
    batches.close()
    again = data.batches(0, 4, start=1)
    assert same(bits(first[1:]), bits([next(again), next(again)]))
    again.close()
    part = data.batches(0, 4, part=(1, 2))
    assert np.array_equal(next(part).inputs[0], first[0].inputs[0][1::2])
    part.close()


def test_an_iterator_is_read_once(networks):
    images, ids = arrays(6)
    data = training_data(zip(images, ids, strict=True), networks["images"])
    assert sum(b.num_examples for b in data.batches(0, 4)) == 6
    with pytest.raises(MLXZooError, match="epochs=1"):
        next(data.batches(1, 4))
    with pytest.raises(ValueError, match="give task="):
        inspect(iter([("a text", "label")]))


def test_what_is_asked_for_lies_in_the_callers_thread(networks):
    """A sequence of the user's may compute with MLX."""

    class Lazy:
        def __len__(self):
            return 6

        def __getitem__(self, i):
            return mx.full((32, 32), i * 10).astype(mx.uint8), i % 2

    data = training_data(Lazy(), networks["images"])
    assert sum(b.num_examples for b in data.batches(0, 4)) == 6


def test_a_wrong_argument_is_refused(networks):
    for options, message in (
        ({"mixup": -1}, "mixup"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"augment": "yes"}, "augment"),
        ({"max_length": 5}, "max_length"),
    ):
        with pytest.raises(ValueError, match=message):
            training_data(arrays(), networks["images"], **options)
    with pytest.raises(ValueError, match="images are mixed"):
        training_data([("a", "x"), ("b", "y")], networks["texts"], mixup=0.1)
    with pytest.raises(ValueError, match="example 0: ndarray is no text"):
        training_data(arrays(), networks["texts"])
    for nothing in (3, {"text": ["a"]}, b"bytes"):
        with pytest.raises(ValueError, match="give a folder"):
            inspect(nothing)


# Labels -----------------------------------------------------------------------------------------


def test_labels_are_in_the_networks_own_order_where_it_has_them(networks):
    model = mlx_zoo.load("bert_docs_topic", pretrained=True, task="text-classification")
    rows = [("a", "torch"), ("b", "numpy")]
    assert training_data(rows, model).labels == model.checkpoint.labels
    with pytest.raises(ValueError, match="3 classes, the head of this network 7: load it with"):
        training_data([*rows, ("c", "jax")], model)
    fresh = networks["texts"]
    assert training_data([("a", "yes"), ("b", "no")], fresh).labels == ("no", "yes")
    assert training_data([("a", 1), ("b", 0)], fresh).labels == ("0", "1")
    numbers = [(f"text {i}", i) for i in (10, 9, 2)]
    assert inspect(numbers).labels == ("2", "9", "10")


def test_numbers_are_the_ids_of_a_network_whose_classes_have_names():
    model = mlx_zoo.load("bert_docs_topic", pretrained=True, task="text-classification")
    data = training_data([(f"text {i}", i) for i in range(7)], model)
    assert data.labels == model.checkpoint.labels
    (batch,) = validation_data([("one", 3), ("two", 5)], model, labels=data.labels).batches(0, 2)
    assert batch.targets.tolist() == [3, 5]


def test_an_unknown_label_in_the_validation_data_is_named_with_its_line(networks, tmp_path):
    (tmp_path / "val.csv").write_text("text,label\nfine,no\nodd,maybe\n")
    with pytest.raises(ValueError, match=r"val\.csv, line 3: 'maybe' is none of the labels, no,"):
        validation_data(tmp_path / "val.csv", networks["texts"], labels=("no", "yes"))


@pytest.mark.parametrize("label", [1.5, None, -1, True, [1]])
def test_what_is_no_label_is_refused(label):
    with pytest.raises(ValueError, match="example 1"):
        inspect([("a", "x"), ("b", label)], "text-classification")


def test_a_part_is_held_out_of_each_class_alike():
    rows = [(f"text {i}", "rare" if i % 10 == 0 else "common") for i in range(100)]
    train, val = hold_out(inspect(rows), 0.2, seed=1)
    assert (val.targets.count("rare"), val.targets.count("common")) == (2, 18)
    assert sorted([*train.inputs, *val.inputs]) == sorted(text for text, _ in rows)
    assert [*hold_out(inspect(rows), 0.2, seed=1)[1].inputs] == [*val.inputs]
    assert [*hold_out(inspect(rows), 0.2, seed=2)[1].inputs] != [*val.inputs]
    assert train.digest != val.digest
    for part in (0.0, 1.0, 1, 0.001):
        with pytest.raises(ValueError, match="val_data="):
            hold_out(inspect(rows), part, seed=1)


def test_of_few_texts_the_end_of_each_is_held_out():
    text = "\n".join(f"line {i}" for i in range(100))
    train, val = hold_out(inspect([text, text]), 0.25, seed=0)
    assert [a + b for a, b in zip(train.inputs, val.inputs, strict=True)] == [text, text]
    assert val.inputs[0].startswith("line ")
    assert 0.2 < len(val.inputs[0]) / len(text) < 0.3


# Texts ------------------------------------------------------------------------------------------


def test_a_table_is_read_with_quotes_marks_and_pairs(tmp_path, networks):
    (tmp_path / "a.csv").write_text(
        '\ufefftext,label\n"one, ""two""\nthree",yes\n\nfour,no\n', encoding="utf-8"
    )
    found = inspect(tmp_path / "a.csv")
    assert found.inputs == ['one, "two"\nthree', "four"]
    assert found.targets == ["yes", "no"]
    (tmp_path / "a.tsv").write_text("premise\thypothesis\tlabel\na\tb\t1\nc\td\t0\n")
    (batch,) = training_data(tmp_path / "a.tsv", networks["texts"]).batches(0, 2)
    ids, mask, types = map(np.array, batch.inputs)
    assert (types.sum(axis=1) > 0).all()  # the second text of a pair
    assert ids.shape == mask.shape == types.shape
    picture(0).save(tmp_path / "x.png")
    (tmp_path / "b.csv").write_text("image,label\nx.png,1\nx.png,0\n")
    assert inspect(tmp_path / "b.csv").inputs == [tmp_path / "x.png"] * 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "is empty"),
        ("a.csv", b"text,label\n", "has no examples"),
        ("a.csv", b"text,label\na,x\nb\n", "line 3: 1 cells, the header has 2"),
        ("a.csv", b'text,label\n"a\nb",x\nc,d,e\n', "line 4: 3 cells"),
        ("a.csv", b'text,label\n"a"b,x\n', "line 2"),
        ("a.csv", b"text,label\na,\n", "line 2: the label is empty"),
        ("a.csv", b"text,label\n,x\n", "line 2: the text is empty"),
        ("a.csv", b"text,label\n\xff\xfe,x\n", "not UTF-8"),
        ("a.csv", b"words,label,label\n", "twice in the header"),
        ("a.csv", b"body,label\na,x\n", "line 2: columns body, label"),
        ("a.csv", b"image,label\nnone.png,x\n", "line 2: there is no file"),
        ("a.jsonl", b'{"text": "a", "label": 0}\n{"text": "b"}\n', "line 2: no column label"),
        ("a.jsonl", b'{"text": "a", "label": 0}\n\n{"text": \n', "line 3: not JSON"),
        ("a.jsonl", b'{"text": 5, "label": 0}\n', "line 1: int is no text"),
        ("a.jsonl", b'["a"]\n', "line 1: an object"),
        ("a.jsonl", b'{"text": "\\ud800", "label": 0}\n', "line 1.*not valid Unicode"),
        ("a.jsonl", b'{"tokens": ["a", "b"], "tags": ["O"]}\n', "line 1: 2 tokens, but 1 tags"),
        ("a.txt", b" \n", "no text"),
        ("a.txt", b"\xff", "not UTF-8"),
        ("a.json", b"{}", "a folder, .csv"),
    ],
)
def test_a_bad_row_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        inspect(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_texts_are_what_the_tokenizer_makes_of_them(networks):
    rows = [("Return the array.", "a"), ("An index of a longer text with more tokens", "b")] * 3
    data = validation_data(rows, networks["texts"], max_length=9)
    (batch,) = data.batches(0, 6)
    tokens = texts.tokenizer_of(networks["texts"])([text for text, _ in rows], max_length=9)
    wide = tokens.input_ids.shape[1]
    for ours, name in zip(batch.inputs, data.prepare.input_names, strict=True):
        assert np.array_equal(np.array(ours)[:, :wide], getattr(tokens, name))
        assert wide == 9 == ours.shape[1]
    assert batch.targets.tolist() == [0, 1] * 3


def test_rows_are_padded_to_multiples(networks):
    assert texts.padded([[1, 2, 3]], 0, 64).tolist() == [[1, 2, 3, 0, 0, 0, 0, 0]]
    assert texts.padded([[1] * 9], 0, 10).shape == (1, 10)


def test_a_tag_is_at_the_first_token_of_its_word(networks):
    words = ["call", "numpy.ndarray.reshape", "unbelievably", "x", "(", "ok"]
    tags = ["O", "B-method", "O", "B-class", "O", "O"]
    data = validation_data([{"tokens": words, "tags": tags}] * 2, networks["tags"])
    (batch,) = data.batches(0, 2)
    backend = texts.tokenizer_of(networks["tags"]).backend
    theirs = backend.encode(words, is_pretokenized=True)
    wanted, seen = [], set()
    for word in theirs.word_ids:
        first = word is not None and word not in seen
        wanted.append(data.labels.index(tags[word]) if first else IGNORED)
        seen.add(word)
    assert wanted.count(IGNORED) > 2  # words of several tokens
    ids, found = np.array(batch.inputs[0])[0], np.array(batch.targets)[0]
    assert ids[: len(theirs)].tolist() == theirs.ids
    assert found[: len(wanted)].tolist() == wanted
    assert (found[len(wanted) :] == IGNORED).all()


def test_gpt2s_tokens_have_the_tags_of_their_words():
    model = mlx_zoo.load("gpt2_docs", pretrained=True, task="token-classification", num_classes=3)
    words, tags = ["the", "ndarray", "of", "zeroes"], ["0", "1", "0", "2"]
    (batch,) = validation_data([(words, tags)], model).batches(0, 1)
    tokenizer = texts.tokenizer_of(model)
    found = np.array(batch.targets)[0]
    said, rows = [], np.array(batch.inputs[0])[0]
    for token, tag in zip(rows.tolist(), found.tolist(), strict=True):
        if tag != IGNORED:
            said.append((tokenizer.decode([token]).strip()[:1], tag))
    assert said == [(word[0], int(tag)) for word, tag in zip(words, tags, strict=True)]


def test_running_text_is_cut_into_blocks(tmp_path, networks):
    model = networks["gpt2"]
    documents = {"b.txt": "Return the array.\n\n  of values\n" * 9, "a.txt": "Raise an error. " * 5}
    for name, text in documents.items():
        (tmp_path / name).write_text(text)
    data = validation_data(tmp_path, model, max_length=16)
    tokenizer = texts.tokenizer_of(model)
    ids = [
        [*tokenizer.backend.encode(documents[name]).ids, tokenizer.eos_token_id]
        for name in ("a.txt", "b.txt")
    ]
    flat = [i for document in ids for i in document]
    assert data.num_examples == len(flat) // 16
    batches = bits(data.batches(0, 5))
    seen = np.concatenate([x for x, _ in batches])
    assert seen.reshape(-1).tolist() == flat[: len(flat) // 16 * 16]
    targets = np.concatenate([t for _, t in batches])
    assert np.array_equal(targets[:, :-1], seen[:, 1:])
    assert (targets[:, -1] == IGNORED).all()
    (short,) = validation_data(["Return it."], model, max_length=64).batches(0, 4)
    assert short.inputs[0].shape[1] == len(tokenizer.backend.encode("Return it.").ids) + 1


@pytest.mark.parametrize("kind", ["gpt2", "masks"])
def test_a_document_that_is_read_in_pieces_has_the_same_tokens(networks, kind, monkeypatch):
    rng = np.random.default_rng(0)
    parts = [
        "word",
        "don't",
        "é",
        "北",
        " ",
        "\n",
        "\n\n",
        "\t",
        " \n ",
        "\r\n",
        ".",
        "7",
        "<|endoftext|>",
    ]
    document = "".join(rng.choice(parts, 4000))
    backend = texts.tokenizer_of(networks[kind]).backend
    backend.no_truncation()
    whole = backend.encode(document, add_special_tokens=False).ids
    monkeypatch.setattr(texts, "PIECE", 50)
    found = [*texts.pieces(document)]
    assert len(found) > 20
    assert "".join(found) == document
    assert [i for p in found for i in backend.encode(p, add_special_tokens=False).ids] == whole


def test_a_piece_ends_where_no_token_reaches_over_it(monkeypatch):
    """GPT-2's vocabulary has tokens of several newlines, and of newlines and blanks."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ċ", "Ġ"), ("ĊĊ", "ĊĊ"), ("Ġ", "a")]
    vocabulary = {token: i for i, token in enumerate([*letters, *map("".join, merges)])}
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rng = np.random.default_rng(0)
    document = "".join(rng.choice(["a", "b", " ", "\n", "\n\n"], 3000))
    monkeypatch.setattr(texts, "PIECE", 10)
    found = [*texts.pieces(document)]
    assert len(found) > 20
    tokens = [token for piece in found for token in backend.encode(piece).tokens]
    assert tokens == backend.encode(document).tokens


def test_of_a_short_text_a_token_is_hidden_all_the_same(networks):
    data = training_data(["the array"], networks["masks"], max_length=16)
    asked = [t for epoch in range(30) for _, t in bits(data.batches(epoch, 1))]
    assert all((targets != IGNORED).any() for targets in asked)


def test_tokens_are_hidden_as_bert_was_trained(networks):
    text = " ".join(f"return the array of {i} values" for i in range(3000))
    data = validation_data([text], networks["masks"], max_length=64)
    tokenizer = texts.tokenizer_of(networks["masks"])
    plain = np.stack(data.blocks)
    assert (plain[:, 0] == tokenizer.token_to_id("[CLS]")).all()
    assert (plain[:, -1] == tokenizer.token_to_id("[SEP]")).all()
    seen, targets = (np.concatenate(x) for x in zip(*bits(data.batches(0, 50)), strict=True))
    chosen = targets != IGNORED
    assert np.array_equal(targets[chosen], plain[chosen])
    assert np.array_equal(seen[~chosen], plain[~chosen])
    assert not chosen[:, [0, -1]].any()
    assert chosen.any(axis=1).all()
    count = chosen.sum()
    assert count > 3000

    def near(share, wanted, of):
        return abs(share - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / of)

    assert near(chosen[:, 1:-1].mean(), 0.15, chosen[:, 1:-1].size)
    hidden = seen[chosen] == tokenizer.mask_token_id
    assert near(hidden.mean(), 0.8, count)
    assert near((~hidden & (seen[chosen] != plain[chosen])).mean(), 0.1, count)
    assert same(
        bits(data.batches(0, 50)),
        [*zip(*(np.array_split(x, range(50, len(x), 50)) for x in (seen, targets)), strict=True)],
    )
    assert not np.array_equal(bits(data.batches(1, 50))[0][0], seen[:50])


def test_streams_of_texts(networks):
    class Documents:
        def __iter__(self):
            return (f"Return the array number {i}." for i in range(200))

    stream = training_data(Documents(), networks["gpt2"], max_length=16)
    listed = validation_data([*Documents()], networks["gpt2"], max_length=16)
    assert same(bits(stream.batches(0, 8)), bits(listed.batches(0, 8)))
    rows = ({"text": f"text {i}", "label": 1} for i in range(5))
    data = training_data(rows, networks["texts"])
    (batch,) = data.batches(0, 8)
    assert batch.targets.tolist() == [1] * 5
    odd = training_data(iter([("a", "0"), ("b", "7")]), networks["texts"])
    with pytest.raises(ValueError, match="example 1: '7' is none of the labels"):
        next(odd.batches(0, 8))


def test_many_small_files_and_a_link_to_above_are_read(tmp_path):
    folder = folder_of_images(tmp_path / "data", ("a", "b"))
    (folder / "a" / "up").symlink_to(folder, target_is_directory=True)
    start = time.monotonic()
    assert len(inspect(folder)) == 6
    assert time.monotonic() - start < 60


def test_json_lines_of_tags(tmp_path, networks):
    rows = [{"tokens": ["a", "b"], "tags": ["O", "B-class"]}, {"words": ["c"], "ner_tags": ["O"]}]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    found = inspect(file)
    assert (found.task, found.labels) == ("token-classification", ("B-class", "O"))
    assert training_data(found, networks["tags"]).labels == networks["tags"].checkpoint.labels

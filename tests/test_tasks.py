"""Pipelines against those of transformers, on the same random networks and texts."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
import transformers
from originals import randomise
from PIL import Image

import mlx_zoo
from mlx_zoo.errors import MLXZooError
from mlx_zoo.verify.reference import import_torchvision

import_torchvision()  # before transformers does

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = "the a cat dog sat on mat in new york paris lives who where is not ? . , ! ' - & 北 京 ß 7"
PIECES = ["##" + c for c in LETTERS] + ["##ing", "##s", "##ed", "##er", "##7", "##ß"]
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS[1:], *WORDS.split(), *PIECES]
SIZES = {
    "vocab_size": len(VOCAB),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 48,
}
TEXTS = [
    "The cat sat on the mat.",
    "Who lives in New York? Wolfgang, not the dog!",
    "Crème brûlée, naïve façade: Ångström",
    "北京 dogs 🤗🤗 and 👩‍👩‍👧 in paris",
    "",
    "  \n\t ",
    "x",
    "don't sit-in & standing-by: mat7cat , paris",
    "York",
    "[UNK] the[SEP]cat [PAD] a",
]
TAGS = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC", 4: "I-LOC", 5: "MISC"}
LONG = " ".join(f"{word}{ending}" for ending in ("", "s", "ing", "xyz") for word in WORDS.split())


def bert_folder(folder, kind, seed=0, lower=True, **config):
    """The transformers original of a tiny BERT with a head of `kind`, its tokenizer beside it."""
    original = getattr(transformers, f"BertFor{kind}")(
        transformers.BertConfig(**SIZES, **{"num_labels": 2, **config})
    )
    randomise(original, seed)
    with torch.no_grad():  # scores far from one another, and other labels for other tokens
        original.bert.embeddings.word_embeddings.weight *= 5
        for name in ("classifier", "qa_outputs"):
            if hasattr(original, name):
                getattr(original, name).weight *= 3
    original.save_pretrained(folder)
    folder.joinpath("vocab.txt").write_text("\n".join(VOCAB), encoding="utf-8")
    options = {"do_lower_case": lower, "model_max_length": 48, "tokenizer_class": "BertTokenizer"}
    folder.joinpath("tokenizer_config.json").write_text(json.dumps(options))
    return f"local-dir:{folder}"


def theirs(task, folder, **options):
    return transformers.pipeline(task, model=str(folder), tokenizer=str(folder), **options)


def assert_same(ours, wanted):
    """The same lists of the same dicts: names exactly, in order, and scores to 1e-4."""
    assert type(ours) is type(wanted)
    if isinstance(wanted, list):
        assert len(ours) == len(wanted)
        for one, other in zip(ours, wanted, strict=True):
            assert_same(one, other)
        return
    assert list(ours) == list(wanted)  # the order of the keys, too
    assert {**ours, "score": 0} == {**wanted, "score": 0}
    assert isinstance(ours["score"], float)
    assert ours["score"] == pytest.approx(float(wanted["score"]), abs=1e-5)


# Texts ------------------------------------------------------------------------------------------

MASKED = [
    "The cat [MASK] on the mat.",
    "[MASK]",
    "in [MASK] york [MASK] 🤗 lives",
    "Crème [MASK], don't sit [PAD] & stand",
]


@pytest.mark.parametrize("lower", [True, False])
def test_fill_mask(tmp_path, lower):
    fill = mlx_zoo.pipeline("fill-mask", bert_folder(tmp_path, "MaskedLM", lower=lower))
    reference = theirs("fill-mask", tmp_path)
    for text in MASKED:
        assert_same(fill(text), reference(text))
    assert_same(fill(MASKED), reference(MASKED))
    assert_same(fill(MASKED, batch_size=2, top_k=3), reference(MASKED, top_k=3))
    targets = ["cat", "dogs", "[MASK]", "wxyz", "cat"]
    assert_same(fill(MASKED, targets=targets), reference(MASKED, targets=targets))
    assert_same(fill(MASKED[0], targets="mat"), reference(MASKED[0], targets="mat"))
    long = "[MASK] " + LONG
    assert_same(fill(long, truncation=True), reference(long, tokenizer_kwargs={"truncation": True}))
    everything = fill(MASKED[0], top_k=10**6)
    assert len(everything) == len(VOCAB)
    assert sum(answer["score"] for answer in everything) == pytest.approx(1)


def test_fill_mask_refuses(tmp_path):
    fill = mlx_zoo.pipeline("fill-mask", bert_folder(tmp_path, "MaskedLM"))
    for wrong, message in {
        "no mask": "no \\[MASK\\]",
        "[MASK] " + LONG: "48 positions: truncation=True",
        7: "int, where str belongs",
        ("a [MASK]", "b"): "has no \\[MASK\\]",  # two texts
        "[MASK] \ud800": "not valid Unicode",
    }.items():
        with pytest.raises(ValueError, match=message):
            fill(wrong)
    with pytest.raises(ValueError, match="tuple, where str belongs"):
        fill([("a [MASK]", "b")])
    with pytest.raises(ValueError, match="has no \\[MASK\\]"):
        fill(LONG + " [MASK]", truncation=True)
    for options in ({"top_k": 0}, {"targets": []}, {"targets": [""]}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            fill("[MASK]", **options)


PAIRS = [{"text": text, "text_pair": TEXTS[-i]} for i, text in enumerate(TEXTS)]
PROBLEMS = {
    "softmax": {"num_labels": 3, "id2label": {0: "bad", 1: "good", 2: "ugly"}},
    "unnamed": {"num_labels": 4},
    "one": {"num_labels": 1},
    "multi-label": {"problem_type": "multi_label_classification"},
    "regression": {"problem_type": "regression", "num_labels": 2},
}


@pytest.mark.parametrize("config", PROBLEMS.values(), ids=PROBLEMS)
def test_text_classification(tmp_path, config):
    name = bert_folder(tmp_path, "SequenceClassification", **config)
    classify = mlx_zoo.pipeline("text-classification", name)
    reference = theirs("text-classification", tmp_path)
    for text in (TEXTS[0], ""):
        assert_same(classify(text), reference(text))  # a list of one
        assert_same(classify(text, top_k=1), reference(text, top_k=1))
    for texts in (TEXTS, PAIRS, TEXTS[:1], PAIRS[0], [TEXTS[1], PAIRS[2]]):
        assert_same(classify(texts, batch_size=3), reference(texts))
        for top_k in (None, 1, 2):
            assert_same(classify(texts, top_k=top_k), reference(texts, top_k=top_k))
    for function in ("softmax", "sigmoid", "none"):
        options = {"function_to_apply": function, "top_k": None}
        assert_same(classify(TEXTS, **options), reference(TEXTS, **options))
    assert_same(classify(LONG, truncation=True), reference(LONG, truncation=True))
    pair = {"text": LONG, "text_pair": LONG[::-1]}
    assert_same(classify(pair, truncation=True), reference(pair, truncation=True))


def test_padding_changes_nothing_whatever_the_tokenizer_names(tmp_path):
    name = bert_folder(tmp_path, "SequenceClassification")
    wanted = mlx_zoo.pipeline("text-classification", name)(TEXTS, batch_size=1)
    options = {"tokenizer_class": "BertTokenizer", "model_input_names": ["input_ids"]}
    tmp_path.joinpath("tokenizer_config.json").write_text(json.dumps(options))
    assert_same(mlx_zoo.pipeline("text-classification", name)(TEXTS), wanted)


def test_text_classification_refuses(tmp_path):
    name = bert_folder(tmp_path, "SequenceClassification")
    classify = mlx_zoo.pipeline("text-classification", name)
    for wrong in (7, {"txt": "a"}, [("a", "b")], {"text": ["a"]}, None, b"a", {}):
        with pytest.raises(ValueError, match=r"text|str"):
            classify(wrong)
    with pytest.raises(ValueError, match=r"'the a cat dog .* has .* tokens, the network 48"):
        classify(["a", LONG])
    for options in ({"top_k": 0}, {"top_k": "2"}, {"function_to_apply": "tanh"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            classify("a", **options)
    assert classify([]) == []


def test_a_fresh_heads_scores_are_not_those_of_the_old_one(tmp_path):
    config = {"num_labels": 1, "problem_type": "regression", "id2label": {0: "price"}}
    name = bert_folder(tmp_path, "SequenceClassification", **config)
    model = mlx_zoo.load(name, True, task="text-classification", num_classes=2)
    answers = mlx_zoo.pipeline("text-classification", model)("a cat", top_k=None)
    assert {answer["label"] for answer in answers} == {"LABEL_0", "LABEL_1"}
    assert sum(answer["score"] for answer in answers) == pytest.approx(1)


STRATEGIES = ("none", "simple", "first", "average", "max")


@pytest.mark.parametrize("seed", [0, 2])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_token_classification(tmp_path, strategy, seed):
    name = bert_folder(tmp_path, "TokenClassification", seed, id2label=TAGS, num_labels=len(TAGS))
    tag = mlx_zoo.pipeline("token-classification", name)
    reference = theirs("token-classification", tmp_path)
    for ignored in (["O"], [], ["PER", "B-LOC", "MISC"]):
        options = {"aggregation_strategy": strategy, "ignore_labels": ignored}
        wanted = reference(TEXTS, **options)
        assert len({a.get("entity", a.get("entity_group")) for w in wanted for a in w}) >= 2
        assert_same(tag(TEXTS, batch_size=3, **options), wanted)
        assert_same(tag(TEXTS[1], **options), reference(TEXTS[1], **options))
        assert_same(tag(LONG, **options), reference(LONG, **options))  # cut, in both
    assert tag("", aggregation_strategy=strategy) == []
    if strategy == "none":
        return
    texts = [LONG, TEXTS[0]]
    for stride in (0, 7, 30):
        options = {"aggregation_strategy": strategy, "stride": stride}
        ours = tag(texts, batch_size=4, **options)
        assert_same(ours, [reference(text, **options) for text in texts])
        assert ours[0][-1]["end"] > 250  # beyond where it is cut


def test_entities_are_where_they_say(tmp_path):
    name = bert_folder(tmp_path, "TokenClassification", lower=False, id2label=TAGS, num_labels=6)
    tag = mlx_zoo.pipeline("token-classification", name)
    for entity in tag(TEXTS[1], ignore_labels=[]):
        assert TEXTS[1][entity["start"] : entity["end"]] == entity["word"].removeprefix("##")


def test_token_classification_refuses(tmp_path):
    tag = mlx_zoo.pipeline("token-classification", bert_folder(tmp_path, "TokenClassification"))
    for options, message in (
        ({"aggregation_strategy": "most"}, "none, simple, first, average, max"),
        ({"stride": 3}, "another aggregation_strategy"),
        ({"stride": 46, "aggregation_strategy": "first"}, "from 0 to 45"),
        ({"stride": -1, "aggregation_strategy": "first"}, "from 0 to 45"),
    ):
        with pytest.raises(ValueError, match=message):
            tag("a cat", **options)
    with pytest.raises(ValueError, match="str"):
        tag([("a", "cat")])


class AnswersOf4:
    """Question answering as transformers 4 did it, of what 5 has left of it."""

    def __init__(self, folder):
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = transformers.BertForQuestionAnswering.from_pretrained(folder)

    @torch.no_grad()
    def __call__(self, question, context, top_k=1, impossible=False, aligned=True, **options):
        length = min(self.tokenizer.model_max_length, options.get("max_seq_len", 384))
        pieces = self.tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=length,
            stride=options.get("doc_stride", min(length // 2, 128)),
            return_overflowing_tokens=True,
        )
        from transformers.pipelines.document_question_answering import select_starts_ends

        found, nothing = [], 1e6
        for i, ids in enumerate(pieces["input_ids"]):
            output = self.model(
                torch.tensor([ids]), token_type_ids=torch.tensor([pieces["token_type_ids"][i]])
            )
            allowed = [
                s == 1 or t == self.tokenizer.cls_token_id
                for s, t in zip(pieces.sequence_ids(i), ids, strict=True)
            ]
            starts, ends, scores, nothing = select_starts_ends(
                output.start_logits,
                output.end_logits,
                1 - np.array([allowed]).astype(int),
                None,
                nothing,
                top_k * 2 + 10 if aligned else top_k,
                impossible,
                options.get("max_answer_len", 15),
            )
            for first, last, score in zip(starts, ends, scores, strict=True):
                if score == 0:  # no span at all
                    continue
                if aligned:
                    start = pieces.word_to_chars(i, pieces.token_to_word(i, first), 1).start
                    end = pieces.word_to_chars(i, pieces.token_to_word(i, last), 1).end
                else:
                    start, end = pieces[i].offsets[first][0], pieces[i].offsets[last][1]
                answer = context[start:end]
                same = [a for a in found if a["answer"].lower() == answer.lower()]
                if same:
                    same[0]["score"] += score.item()
                else:
                    place = {"start": start, "end": end}
                    found.append({"score": score.item(), **place, "answer": answer})
        if impossible:
            found.append({"score": nothing, "start": 0, "end": 0, "answer": ""})
        found = sorted(found, key=lambda answer: answer["score"], reverse=True)[:top_k]
        return found[0] if top_k == 1 else found


QUESTIONS = [
    {"question": "Who lives in New York?", "context": "The Cat, the cat and Wolfgang live there."},
    {"question": "where", "context": LONG},
    {"question": "北京 🤗?", "context": "  Crème brûlée 🤗 in 北京, naïve façade   "},
    {"question": "a", "context": "b"},
]


@pytest.mark.parametrize("seed", range(3))
def test_question_answering(tmp_path, seed):
    ask = mlx_zoo.pipeline(
        "question-answering", bert_folder(tmp_path, "QuestionAnswering", seed, lower=seed != 1)
    )
    reference = AnswersOf4(tmp_path)
    for ours, named in (
        ({}, {}),
        ({"top_k": 4}, {"top_k": 4}),
        ({"handle_impossible_answer": True, "top_k": 3}, {"impossible": True, "top_k": 3}),
        ({"align_to_words": False, "top_k": 5}, {"aligned": False, "top_k": 5}),
        ({"max_seq_len": 30, "doc_stride": 5}, {"max_seq_len": 30, "doc_stride": 5}),
        ({"max_answer_len": 2, "top_k": 2}, {"max_answer_len": 2, "top_k": 2}),
    ):
        wanted = [reference(**question, **named) for question in QUESTIONS]
        assert_same(ask(QUESTIONS, batch_size=3, **ours), wanted)
        assert_same(ask(**QUESTIONS[1], **ours), wanted[1])
        assert_same(ask(QUESTIONS[1], **ours), wanted[1])
    for question, answer in zip(QUESTIONS, ask(QUESTIONS), strict=True):
        assert question["context"][answer["start"] : answer["end"]] == answer["answer"] != ""
    one_context = ask(question=["who", "where is a"], context=LONG)
    assert_same(one_context, [reference(q, LONG) for q in ("who", "where is a")])
    assert ask(question="who", context=" ") == {"score": 0.0, "start": 0, "end": 0, "answer": ""}


def test_question_answering_refuses(tmp_path):
    ask = mlx_zoo.pipeline("question-answering", bert_folder(tmp_path, "QuestionAnswering"))
    for arguments, message in (
        ({}, "give either"),
        ({"question": "a"}, "NoneType"),
        ({"question": "", "context": "b"}, "empty question"),
        ({"question": ["a", "b"], "context": ["b"]}, "a context each"),
        ({"inputs": "who?"}, "'question': ..., 'context'"),
        ({"inputs": [("who?", "me")]}, "'question': ..., 'context'"),
        ({"inputs": {"question": "a", "context": 7}}, "int, where str"),
        ({"question": "a", "context": "b", "top_k": 0}, "top_k"),
        ({"question": "a", "context": "b", "max_answer_len": 0}, "max_answer_len"),
        ({"question": "a", "context": "b", "doc_stride": -1}, "doc_stride"),
        ({"question": "a " * 40, "context": "b"}, "40 tokens, which leaves 5 of max_seq_len=48"),
        ({"question": "a", "context": "b", "doc_stride": 44}, "doc_stride=44"),
        ({"question": "a", "context": "b", "max_seq_len": 3}, "leaves -1"),
    ):
        with pytest.raises(ValueError, match=message):
            ask(**arguments)
    assert ask(question="a", context=LONG, doc_stride=43)["answer"]


def gpt2_folder(folder, kind, **config):
    """A tiny GPT-2 with a head, and a byte-level vocabulary of its own."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([LONG, *TEXTS], 300, special_tokens=["<|endoftext|>"])
    tokenizer.save_model(str(folder))
    folder.joinpath("tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 300}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
    kind = getattr(transformers, f"GPT2{kind}")
    original = randomise(kind(transformers.GPT2Config(**sizes, **ends, **config)))
    with torch.no_grad():
        original.transformer.wte.weight *= 5
    original.save_pretrained(folder)
    return f"local-dir:{folder}"


def test_gpt2_classifies_texts(tmp_path):
    """Without a padding token, too: transformers then takes one text at a time, ours do not."""
    name = gpt2_folder(tmp_path, "ForSequenceClassification", num_labels=3)
    texts = [text for text in TEXTS if text]
    classify = mlx_zoo.pipeline("text-classification", name)
    reference = theirs("text-classification", tmp_path)
    assert_same(classify(texts, batch_size=4, top_k=None), reference(texts, top_k=None))
    with pytest.raises(ValueError, match="an empty text has no tokens"):
        classify("")


@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gpt2_classifies_tokens(tmp_path, strategy):
    name = gpt2_folder(tmp_path, "ForTokenClassification", id2label=TAGS, num_labels=len(TAGS))
    texts = [text for text in TEXTS if text]
    options = {"aggregation_strategy": strategy, "ignore_labels": []}
    ours = mlx_zoo.pipeline("token-classification", name)(texts, batch_size=4, **options)
    assert_same(ours, theirs("token-classification", tmp_path)(texts, **options))


def test_sentence_embedding(minilm, tmp_path):
    embed = mlx_zoo.pipeline("sentence-embedding", f"local-dir:{minilm}")
    vectors = embed(TEXTS, batch_size=3)
    assert vectors.shape == (len(TEXTS), 384)
    assert vectors.dtype == np.float32
    for text, vector in zip(TEXTS, vectors, strict=True):
        np.testing.assert_allclose(embed(text), vector, atol=1e-6)
    np.testing.assert_allclose(list(embed(iter(TEXTS), batch_size=4)), vectors, atol=1e-6)
    for wrong in ([], [7], 7, "a\ud800"):
        with pytest.raises(ValueError, match=r"empty list|str belongs|Unicode"):
            embed(wrong)


# Images -----------------------------------------------------------------------------------------


def picture(seed, size=(40, 40)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def resnet_folder(folder, **config):
    """No image needs resizing, which is another test's: torchvision's differs from Pillow's."""
    sizes = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1]}
    config = transformers.ResNetConfig(**sizes, **config)
    original = randomise(transformers.ResNetForImageClassification(config))
    original.save_pretrained(folder)
    how = {"image_processor_type": "ConvNextImageProcessor", "crop_pct": 1.0}
    how |= {"size": {"shortest_edge": 40}, "image_mean": [0.4] * 3, "image_std": [0.3] * 3}
    folder.joinpath("preprocessor_config.json").write_text(json.dumps(how))
    return f"local-dir:{folder}"


@pytest.mark.parametrize("config", PROBLEMS.values(), ids=PROBLEMS)
def test_image_classification(tmp_path, config):
    classify = mlx_zoo.pipeline("image-classification", resnet_folder(tmp_path, **config))
    reference = transformers.pipeline("image-classification", model=str(tmp_path))
    images = [picture(seed) for seed in range(5)]
    for options in ({}, {"top_k": 2}, {"function_to_apply": "sigmoid"}):
        assert_same(classify(images[0], **options), reference(images[0], **options))
        assert_same(classify(images, batch_size=2, **options), reference(images, **options))
    assert len(classify(images[0], top_k=None)) == config.get("num_labels", 2)
    for wrong in ({"top_k": 0}, {"batch_size": 0}, {"function_to_apply": "tanh"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            classify(images, **wrong)
    with pytest.raises(ValueError, match="not an image"):
        classify(["no such file"])


def test_image_feature_extraction(tmp_path):
    extract = mlx_zoo.pipeline("image-feature-extraction", resnet_folder(tmp_path))
    reference = transformers.pipeline("image-feature-extraction", model=str(tmp_path))
    images = [picture(seed) for seed in range(5)]
    vectors = extract(images, batch_size=2)
    wanted = np.array(reference(images, pool=True)).squeeze()
    assert vectors.shape == wanted.shape == (5, 32)
    np.testing.assert_allclose(vectors, wanted, atol=1e-5)
    np.testing.assert_allclose(extract(images[3]), wanted[3], atol=1e-5)
    np.testing.assert_allclose(list(extract(iter(images))), wanted, atol=1e-5)
    with pytest.raises(ValueError, match="empty list"):
        extract([])


# Any of them ------------------------------------------------------------------------------------


def counted(items, taken):
    for item in items:
        taken.append(item)
        yield item


def test_iterators_are_read_as_their_answers_are(tmp_path):
    name = bert_folder(tmp_path, "SequenceClassification")
    classify = mlx_zoo.pipeline("text-classification", name)
    taken = []
    texts = [f"cat {i}" for i in range(7)]
    found = classify(counted(texts, taken), batch_size=3)
    assert not taken
    first = next(found)
    assert len(taken) == 3
    assert_same([first, *found], classify(texts))
    assert len(taken) == 7
    endless = classify(("a cat" for _ in iter(int, 1)), batch_size=2)
    assert [next(endless)["label"] for _ in range(5)]

    tag = mlx_zoo.pipeline("image-feature-extraction", resnet_folder(tmp_path))
    taken = []
    next(tag(counted([picture(i) for i in range(6)], taken), batch_size=2))
    assert len(taken) == 2


def test_like_lengths_are_read_together_and_answered_in_order(tmp_path, monkeypatch):
    name = bert_folder(tmp_path, "SequenceClassification")
    classify = mlx_zoo.pipeline("text-classification", name)
    texts = [f"the {'cat ' * (i % 2 * 30)}{'abcdefgh'[i % 8]}" for i in range(80)]
    wanted = [classify(text)[0] for text in texts]
    shapes = []
    arrays = type(classify).arrays

    def spied(self, pieces):
        found = arrays(self, pieces)
        shapes.append(found["input_ids"].shape)
        return found

    monkeypatch.setattr(type(classify), "arrays", spied)
    assert_same(classify(texts, batch_size=4), wanted)
    assert sorted(set(shapes)) == [(4, 4), (4, 34)]


def test_a_bar_on_a_terminal_and_nothing_in_a_pipe(tmp_path, monkeypatch, capsys):
    name = bert_folder(tmp_path, "SequenceClassification")
    classify = mlx_zoo.pipeline("text-classification", name)
    capsys.readouterr()
    classify(TEXTS, batch_size=2)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    classify("one text")
    assert capsys.readouterr() == ("", "")
    classify(TEXTS, batch_size=2)
    out, err = capsys.readouterr()
    assert not out
    assert "100%" in err


TASKS = {
    "fill-mask": "MaskedLM",
    "text-classification": "SequenceClassification",
    "token-classification": "TokenClassification",
    "question-answering": "QuestionAnswering",
}


@pytest.mark.parametrize("task", TASKS)
def test_a_network_with_another_head_is_refused(tmp_path, task):
    name = bert_folder(tmp_path, TASKS[task])
    body = mlx_zoo.load(name, pretrained=True)
    with pytest.raises(ValueError, match=f"no head: load it with task='{task}'"):
        mlx_zoo.pipeline(task, body)
    with pytest.raises(ValueError, match="needs a network that takes images"):
        mlx_zoo.pipeline("image-classification", body)
    model = mlx_zoo.load(name, pretrained=True, task=task)
    other = next(t for t in TASKS if t != task)
    with pytest.raises(ValueError, match=f"the head of {task}: load it with task='{other}'"):
        mlx_zoo.pipeline(other, model)
    with pytest.raises(ValueError, match="dtype= is for a name"):
        mlx_zoo.pipeline(task, model, dtype="float16")
    with pytest.raises((MLXZooError, ValueError)):
        mlx_zoo.pipeline(other, name)
    with pytest.raises(ValueError, match="random weights"):
        mlx_zoo.pipeline(task, mlx_zoo.load(name, task=task))
    with pytest.raises(ValueError, match="needs a network that takes texts"):
        mlx_zoo.pipeline(task, mlx_zoo.load("resnet_digits", True))
    with pytest.raises(ValueError, match=r"one of image-classification, .*, text-generation"):
        mlx_zoo.pipeline("summarisation", name)


def test_nothing_is_dropped_even_where_a_network_was_trained(tmp_path):
    name = bert_folder(tmp_path, "SequenceClassification")
    model = mlx_zoo.load(name, True, task="text-classification").train()
    classify = mlx_zoo.pipeline("text-classification", model)
    assert_same(classify("a cat"), mlx_zoo.pipeline("text-classification", name)("a cat"))


@pytest.mark.parametrize("task", TASKS)
def test_a_converted_folder_answers_alike(tmp_path, task):
    original = tmp_path / "original"
    original.mkdir()
    config = {"problem_type": "regression"} if task == "text-classification" else {}
    name = bert_folder(original, TASKS[task], **config)
    asked = {"question": "who [MASK]?", "context": TEXTS[1]}
    asked = asked if task == "question-answering" else "the [MASK] in New York"
    wanted = mlx_zoo.pipeline(task, name)(asked)
    folder = mlx_zoo.convert(name, tmp_path / "converted", task=task)
    shutil.rmtree(original)
    assert_same(mlx_zoo.pipeline(task, f"local-dir:{folder}")(asked), wanted)


def test_half_precision_answers_alike(tmp_path):
    name = bert_folder(tmp_path, "SequenceClassification", num_labels=3)
    half = mlx_zoo.pipeline("text-classification", name, dtype="float16")
    exact = mlx_zoo.pipeline("text-classification", name)
    for one, other in zip(half(TEXTS, top_k=None), exact(TEXTS, top_k=None), strict=True):
        scores = {answer["label"]: answer["score"] for answer in one}
        for answer in other:
            assert scores[answer["label"]] == pytest.approx(answer["score"], abs=0.02)


def test_text_generation(tmp_path):
    name = gpt2_folder(tmp_path, "LMHeadModel")
    (answer,) = mlx_zoo.pipeline("text-generation", name)("the cat", max_tokens=5)
    assert answer["generated_text"].startswith("the cat")

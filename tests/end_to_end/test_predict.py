"""`limber-fast predict`: what it writes is what `Limber` says, and what `evaluate` reads."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("timm")
Image = pytest.importorskip("PIL.Image")

from gptj_cases import byte_tokenizer  # noqa: E402
from magma_model import Magma  # noqa: E402

from limber_fast import GPTJ, GPTJConfig, Limber, cli  # noqa: E402
from limber_fast.models.encoders import encoder  # noqa: E402

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
COLOURS = ("red", "lime", "blue", "cyan", "gray")
ASKED = ("what?", "why not?")


@pytest.fixture
def world(tmp_path):
    """(Limber, pictures, flags): five pictures, the last one broken, with captions and two questions each."""
    lm, pictures = tmp_path / "lm", []
    config = GPTJConfig(vocab_size=300, n_positions=256, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, eos_token_id=0,
                        initializer_range=0.15)  # fmt: skip
    GPTJ.from_config(config, seed=1).save_pretrained(lm)
    byte_tokenizer().save_pretrained(lm)
    for i, colour in enumerate(COLOURS):
        pictures.append(Image.new("RGB", (40, 40), colour))
        pictures[-1].save(tmp_path / f"COCO_val2014_{i:012d}.jpg", quality=95)
        pictures[-1] = Image.open(tmp_path / f"COCO_val2014_{i:012d}.jpg").convert("RGB")
    (tmp_path / "COCO_val2014_000000000004.jpg").write_bytes(b"no picture")
    images = [{"id": i, "file_name": f"COCO_val2014_{i:012d}.jpg"} for i in range(5)]
    captions = [{"image_id": i, "caption": f"all {colour}"} for i, colour in enumerate(COLOURS)]
    write(tmp_path / "references.json", {"images": images, "annotations": captions})
    asked = [{"question_id": 10 * i + j, "image_id": i, "question": q} for i in range(5)
             for j, q in enumerate(ASKED)]  # fmt: skip
    write(tmp_path / "questions.json", {"data_subtype": "val2014", "questions": asked})
    answers = [{"answer": "yes"}, {"answer": "no"}, {"answer": "yes"}]
    write(tmp_path / "annotations.json", {"annotations": [
        {**{k: x[k] for k in ("question_id", "image_id")}, "question_type": "what", "answer_type": "other",
         "answers": answers} for x in asked]})  # fmt: skip
    torch.manual_seed(3)
    limber = Limber(encoder("timm:test_resnet", weights=False, seed=2), GPTJ.from_pretrained(lm), byte_tokenizer())
    limber.projection.weight.data.mul_(30)  # so that a picture changes what is said
    limber.eval().save_pretrained(tmp_path / "map")
    flags = ("--limber", tmp_path / "map", "--language-model", lm, "--images", tmp_path, "--max-new-tokens", 8,
             "--batch-size", 3, "--output", tmp_path / "said.json")  # fmt: skip
    return limber, pictures[:4], flags


def write(path, content):
    path.write_text(json.dumps(content))


def predict(folder, *arguments):
    code = cli.main(["predict", *map(str, arguments)])
    return code, json.loads((folder / "said.json").read_text()) if (folder / "said.json").exists() else None


def test_captions_and_their_controls(world, tmp_path, capsys):
    limber, pictures, flags = world
    references = ("--references", tmp_path / "references.json")
    code, said = predict(tmp_path, "caption", *references, *flags)
    expected = limber.caption(pictures, max_new_tokens=8)
    assert code == 0 and said == [{"image_id": i, "caption": text} for i, text in enumerate(expected)]
    assert len(set(expected)) > 1
    assert "1 broken image skipped" in (out := capsys.readouterr().out) and "4 of 5" in out
    evaluated = ("--images", str(tmp_path), "--subset", "--output", str(tmp_path / "out"))
    assert cli.main(["evaluate", "caption", str(tmp_path / "said.json"), *map(str, references), *evaluated]) == 0
    _, blind = predict(tmp_path, "caption", *references, *flags, "--control", "blind")
    black = limber.caption([Image.new("RGB", (40, 40))], max_new_tokens=8)[0]
    assert [x["caption"] for x in blind] == [black] * 4
    _, shuffled = predict(tmp_path, "caption", *references, *flags, "--control", "shuffled", "--seed", 1)
    assert [x["image_id"] for x in shuffled] == [0, 1, 2, 3]
    assert sorted(x["caption"] for x in shuffled) == sorted(expected) != [x["caption"] for x in shuffled]
    _, sampled = predict(tmp_path, "caption", *references, *flags, "--decoding", "limber", "--seed", 7)
    told = limber.caption(pictures, max_new_tokens=8, decoding="limber", seed=7)
    assert [x["caption"] for x in sampled] == told


def test_answers_behind_shots(world, tmp_path, monkeypatch):
    limber, pictures, flags = world
    questions = ("--questions", tmp_path / "questions.json")
    code, said = predict(tmp_path, "vqa", *questions, *flags)
    expected = [limber.answer([x], [q], max_new_tokens=8)[0] for x in pictures for q in ASKED]
    assert code == 0 and [x["answer"] for x in said] == expected
    assert [x["question_id"] for x in said] == [10 * i + j for i in range(4) for j in range(2)]
    shots = ("--shots", 2, "--shot-questions", tmp_path / "questions.json", "--shot-annotations",
             tmp_path / "annotations.json", "--shot-images", tmp_path)  # fmt: skip
    made, prefix = [], Limber.prefix
    monkeypatch.setattr(Limber, "prefix", lambda self, *a, **k: made.append(a) or prefix(self, *a, **k))
    code, shown = predict(tmp_path, "vqa", *questions, *flags, *shots)
    assert len(made) == 1  # not one for each of four batches
    assert code == 0 and len(shown) == 8 and [x["answer"] for x in shown] != expected
    assert cli.main(["evaluate", "vqa", str(tmp_path / "said.json"), "--questions", str(tmp_path / "questions.json"),
                     "--annotations", str(tmp_path / "annotations.json"), "--images", str(tmp_path), "--subset",
                     "--output", str(tmp_path / "out")]) == 0  # fmt: skip


def test_the_language_model_is_told_in_words(world, tmp_path):
    limber, _, flags = world
    flags = ("vqa", "--questions", tmp_path / "questions.json", *flags, "--control", "oracle", "--captions",
             tmp_path / "references.json")  # fmt: skip
    options = {"max_new_tokens": 8, "stop_strings": "\n", "tokenizer": limber.tokenizer}

    def answers(shown=""):
        texts = [f"{shown}all {colour} Q: {question} A:" for colour in COLOURS[:4] for question in ASKED]
        prompts = [limber.tokenizer(text).input_ids for text in texts]
        return [limber.language_model.generate([x], **options).texts[0].strip() for x in prompts]

    code, said = predict(tmp_path, *flags)
    assert code == 0 and [x["answer"] for x in said] == answers() and len(set(answers())) > 1
    shots = ("--shots", 1, "--shot-questions", tmp_path / "questions.json", "--shot-annotations",
             tmp_path / "annotations.json", "--shot-images", tmp_path)  # fmt: skip
    code, said = predict(tmp_path, *flags, *shots)
    shown = {tuple(answers(f"all {colour} Q: {question} A: yes\n")) for colour in COLOURS for question in ASKED}
    assert code == 0 and tuple(x["answer"] for x in said) in shown


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_takes_the_whole_model(world, tmp_path):
    flags = ("caption", "--references", tmp_path / "references.json", *world[2])
    torch.cuda.reset_peak_memory_stats()
    code, said = predict(tmp_path, *flags, "--device", "cuda")
    assert code == 0 and len(said) == 4 and torch.cuda.max_memory_allocated()


def test_a_released_map_needs_its_encoder(world, tmp_path, capsys):
    limber, pictures, flags = world
    path = tmp_path / "proj.ckpt"
    torch.save({"weight": limber.projection.weight.data, "bias": limber.projection.bias.data}, path)
    flags = ("caption", "--references", tmp_path / "references.json", *flags, "--limber", path)
    assert predict(tmp_path, *flags) == (1, None)
    assert "--encoder must be given with a file of P and b alone" in capsys.readouterr().err
    flags += ("--encoder", "timm:test_resnet", "--encoder-weights", "random", "--seed", 2)
    code, said = predict(tmp_path, *flags, "--device", "cpu")
    assert code == 0 and [x["caption"] for x in said] == limber.caption(pictures, max_new_tokens=8)


@pytest.fixture
def magma(world, tmp_path):
    """(MAGMA's checkpoint over the world's encoder and of its language model's sizes, flags without a map)."""
    (limber, _, flags), sizes = world, {"width": 64, "layers": 2, "heads": 4, "rotary": 8, "inner": 16}
    plain = Magma(limber.encoder.trunk, limber.encoder.width, **sizes, words=290, vocabulary=300)
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": {name: x.clone() for name, x in plain.state_dict().items()}}, path)
    return path, flags[flags.index("--images") :]


def test_magma(world, magma, tmp_path):
    (_, pictures, _), (path, flags), lm = world, magma, tmp_path / "lm"
    config = GPTJConfig(vocab_size=300, n_positions=256, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, eos_token_id=0,
                        adapter_width=16)  # fmt: skip
    trunk = encoder("timm:test_resnet", weights=False, seed=5)  # replaced by the file's
    limber = Limber.from_magma(path, byte_tokenizer(), encoder=trunk, config=config).eval()
    flags = ("--magma", path, "--language-model", lm, "--encoder", "timm:test_resnet", "--device", "cpu", *flags)
    code, said = predict(tmp_path, "caption", "--references", tmp_path / "references.json", *flags)
    expected = limber.caption(pictures, max_new_tokens=8)
    assert code == 0 and said == [{"image_id": i, "caption": text} for i, text in enumerate(expected)]
    assert len(set(expected)) > 1
    code, said = predict(tmp_path, "vqa", "--questions", tmp_path / "questions.json", *flags)
    expected = [limber.answer([x], [q], max_new_tokens=8)[0] for x in pictures for q in ASKED]
    assert code == 0 and [x["answer"] for x in said] == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [(("--magma", "FILE"), "predict: --tokenizer must be given with --magma; got nothing"),
     (("--magma", "FILE", "--tokenizer", "lm", "--encoder-weights", "x.pt"),
      "--encoder-weights must be left out with --magma, whose file has them; got 'x.pt'"),
     (("--magma", "FILE", "--tokenizer", "lm", "--encoder", "timm:test_resnet"),
      "tensor 'image_prefix.proj.weight' must be (4096, 96); got shape (64, 96)"),  # GPT-J-6B's by default
     (("--magma", "FILE", "--language-model", "lm", "--encoder", "timm:test_vit"),
      "the checkpoint must hold MAGMA's tensors alone; got 'image_prefix.enc."),
     (("--magma", "nowhere"), "nowhere: no such file or folder"),
     (("--limber", "map"), "predict: --language-model must be given with --limber; got nothing")],
)  # fmt: skip
def test_bad_flags_of_magma_are_one_line(magma, tmp_path, capsys, change, message):
    path, flags = magma
    change = [{"FILE": path, "lm": tmp_path / "lm", "map": tmp_path / "map"}.get(x, x) for x in change]
    assert predict(tmp_path, "vqa", "--questions", tmp_path / "questions.json", *flags, *change) == (1, None)
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [(("--shots", 2), "--shots must come with --shot-questions"),
     (("--control", "oracle"), "--control oracle must come with --captions"),
     (("--captions", "few.json"), "--control oracle must come with --captions, and those with it"),
     (("--control", "oracle", "--captions", "few.json"), "few.json: no caption of image 1, which is asked about"),
     (("--control", "oracle", "--captions", "few.json", "few.json"), "image 0 comes twice"),
     (("--file-name", "{x}"), "file_name must be a pattern"),
     (("--file-name", "{image_id.x}"), "file_name must be a pattern"),
     (("--limber", "nowhere"), "nowhere: no such file or folder"),
     pytest.param(("--device", "cuda"), "predict: --device must be one that torch sees; got 'cuda' without a GPU",
                  marks=NO_GPU),
     (("--output", "."), "--output must be a file; got the folder ."),
     (("--language-model", "nowhere"), "nowhere"), (("--questions", "nothing.json"), "nothing.json")],
)  # fmt: skip
def test_bad_input_is_one_line_and_writes_nothing(world, tmp_path, capsys, change, message):
    _, _, flags = world
    few = {"images": [{"id": i, "file_name": "a.jpg"} for i in range(2)],
           "annotations": [{"image_id": 0, "caption": "all red"}, {"image_id": 1, "caption": " \n"}]}  # fmt: skip
    write(tmp_path / "few.json", few)
    change = [tmp_path / x if x == "few.json" else x for x in change]
    assert predict(tmp_path, "vqa", "--questions", tmp_path / "questions.json", *flags, *change) == (1, None)
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_folder_without_a_tokenizer_is_one_line(world, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    flags = ("vqa", "--questions", tmp_path / "questions.json", *world[2], "--tokenizer", tmp_path / "empty")
    assert predict(tmp_path, *flags) == (1, None)
    said = capsys.readouterr().err
    assert "predict" in said and "tokenizer" in said and said.count("\n") == 1

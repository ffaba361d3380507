"""Study files: what they may leave out, and what can be wrong with them."""

from pathlib import Path

import pytest

from apportion.errors import InvalidInput
from apportion.studies.initial import init_file
from apportion.studies.specification import StudySpec, difference, load
from apportion.studies.specification.sections import DataSection, ModelSection

MODEL = '[model]\nsource = "hf:org/model"\n'
DATA = '[data]\nsource = "text:corpus"\n'
LIMITS = '[limits]\nweight_bytes = "0.5x dense"\n'
LEAST = MODEL + DATA + LIMITS
SPACE = '[[space]]\nsites = "*"\noptions = ["dense", "w8"]\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    demo = tmp_path / "demo"
    (demo / "corpus").mkdir(parents=True)
    (demo / "model.py").write_text("def build(): ...\n")
    return demo


def problems(folder: Path, text: str) -> list[str]:
    file = folder / "study.toml"
    file.write_text(text)
    with pytest.raises(InvalidInput) as refusal:
        load(file)
    return [line.removeprefix(f"{file}: ") for line in str(refusal.value).splitlines()]


MALFORMED = {
    "no model": (DATA + LIMITS, 'model: missing; write [model] with source = "hf:ORG/NAME"'),
    "no data": (MODEL + LIMITS, 'data: missing; write [data] with source = "text:corpus"'),
    "no limit": (MODEL + DATA, "limits: at least one is needed"),
    "empty limits": (MODEL + DATA + "[limits]\n", "limits: at least one is needed"),
    "no source": ("[model]\n" + DATA + LIMITS, 'model.source: missing; write source = "hf:'),
    "name": (LEAST + '[study]\nname = "A b"\n', 'study.name: "A b" is no name'),
    "long name": (LEAST + f'[study]\nname = "{"a" * 65}"\n', "at most 64"),
    "negative seed": (LEAST + "[study]\nseed = -1\n", "study.seed: must be at least 0, got -1"),
    "text for number": (LEAST + '[study]\nseed = "x"\n', 'must be a whole number, got "x"'),
    "truth for number": (LEAST + "[study]\nseed = true\n", "must be a whole number, got true"),
    "fraction": (LEAST + "[search]\nwindows = 1.5\n", "search.windows: must be a whole number"),
    "number for text": ("[model]\nsource = 3\n" + DATA + LIMITS, "a text in quotes, got 3"),
    "number for table": ("search = 3\n" + LEAST, "search: must be a table, got 3"),
    "list for table": ("[[model]]\n" + DATA + LIMITS, "model: must be a table, got a list"),
    "table for list": (
        LEAST + '[space]\nsites = "*"\n',
        "space: must be a list [...], got a",
    ),
    "unknown table": (LEAST + "[serch]\n", 'serch: unknown key; did you mean "search"?'),
    "unknown key": (MODEL + DATA + "contxt = 3\n" + LIMITS, "data.contxt: unknown key; did you"),
    "key of another table": (LEAST + '[study]\nsolver = "ilp"\n', "it belongs into [search]"),
    "dtype": (MODEL + 'dtype = "float31"\n' + DATA + LIMITS, 'did you mean "float32"?'),
    "solver": (LEAST + '[search]\nsolver = "hybird"\n', 'did you mean "hybrid"?'),
    "loss": (LEAST + '[objective]\nloss = "ppl"\n', 'objective.loss: "ppl" is no loss; known: kl'),
    "threads": (LEAST + "[objective]\nthreads = 0\n", "objective.threads: must be at least 1"),
    "model reference": ('[model]\nsource = "python:x"\n' + DATA + LIMITS, "names no function"),
    "model folder": ('[model]\nsource = "./none"\n' + DATA + LIMITS, "model.source: no folder /"),
    "model file": (
        '[model]\nsource = "python:no.py:f"\n' + DATA + LIMITS,
        "model.source: no file /",
    ),
    "hub name": ('[model]\nsource = "hf:a/b/c"\n' + DATA + LIMITS, "neither a folder nor the"),
    "data reference": (MODEL + '[data]\nsource = "corpus"\n' + LIMITS, 'write "text:corpus"'),
    "data folder": (MODEL + '[data]\nsource = "text:none"\n' + LIMITS, "data.source: no file or"),
    "half of the parts": (MODEL + '[data]\nsearch = "text:corpus"\n' + LIMITS, "data: give either"),
    "samples of text": (
        MODEL + DATA + "samples = { search = 3 }\n" + LIMITS,
        "data.samples: is",
    ),
    "tokens of samples": (
        MODEL + '[data]\nsource = "python:model.py:build"\ncontext = 8\n' + LIMITS,
        "data.context: is for text: sources",
    ),
    "option": (LEAST + SPACE.replace("w8", "w4q8"), "space[1].options: "),
    "option of the future": (
        LEAST + SPACE.replace("w8", "fp16"),
        "fp16 is not realized",
    ),
    "second entry": (LEAST + SPACE + SPACE.replace("w8", "nope"), "space[2].options: "),
    "no options": (LEAST + '[[space]]\nsites = "*"\n', "space[1].options: missing; write options"),
    "empty options": (
        LEAST + '[[space]]\nsites = "*"\noptions = []\n',
        "options: must not be",
    ),
    "empty space": ("space = []\n" + LEAST, "space: must not be empty; leave it out"),
    "device kind": (LEAST + '[devices.a]\nkind = "gpu"\n', '"gpu" is none of cpu, recorded'),
    "device name": (LEAST + "[devices.worst]\n", '"worst" means the slowest of all devices'),
    "recorded without file": (
        LEAST + '[devices.a]\nkind = "recorded"\n',
        "a.file: missing",
    ),
    "phase": (LEAST + '[devices.a]\nrequest = [{ phase = "prefil" }]\n', 'mean "prefill"?'),
    "prefill without tokens": (
        LEAST + '[devices.a]\nrequest = [{ phase = "prefill" }]\n',
        "devices.a.request[1].tokens: missing; prefill needs it",
    ),
    "decode of tokens": (
        LEAST + '[devices.a]\nrequest = [{ phase = "decode", tokens = 3 }]\n',
        "devices.a.request[1].tokens: is not for decode; give context",
    ),
    "limit of no device": (
        LEAST + 'latency.heer = "1 ms"\n',
        'limits.latency.heer: no device "heer"; did you mean "here"?',
    ),
    "limit without unit": (LEAST + 'latency.here = "900"\n', '"900" is no quantity'),
    "too many windows": (LEAST + "[search]\nwindows = 999\n", "search.windows: 999 windows of 512"),
    "small budget": (LEAST + "[search]\ntokens = 5\n", "search.tokens: 5 is less than one"),
    "stages": (LEAST + "[search]\nstages = [8, 4]\n", "search.stages: must not fall"),
    "survivors": (LEAST + "[search]\nsurvivors = [2, 2]\n", "search.survivors: the last must be 1"),
    "start": (LEAST + '[search]\nstart = ["owl", "no.txt"]\n', "search.start: no file /"),
    "start folder": (LEAST + '[search]\nstart = "corpus"\n', "is a folder; name the file in it"),
    "start of another kind": (LEAST + "[search]\nstart = [3]\n", "search.start: must be a text"),
    "syntax": (LEAST + "seed =\n", "line 7, column 7: invalid value"),
    "no end of text": ('[model]\nsource = "hf:x', "end of document: "),
    "table twice": (LEAST + MODEL, "line 7, column 7: cannot declare [model] twice"),
    "empty": ("", 'is empty; "apportion init MODEL" writes one'),
}


@pytest.mark.parametrize(("text", "words"), MALFORMED.values(), ids=MALFORMED.keys())
def test_load_malformed_says_it_in_one_line(folder: Path, text: str, words: str) -> None:
    (line,) = problems(folder, text)
    assert words in line
    assert not any(jargon in line for jargon in ("pydantic", "http", "Input should", "type="))


def test_load_all_problems_at_once(folder: Path) -> None:
    text = '[model]\nsource = 3\n[data]\nsource = "text:none"\n[limits]\nbits = "x"\n[serch]\n'
    places = [line.split(":")[0] for line in problems(folder, text)]
    assert sorted(places) == ["data.source", "limits.bits", "model.source", "serch"]


@pytest.mark.parametrize(
    ("content", "words"), [(b"\xff\xfe\x00", "is no text file"), (b"a = 1\0", "is no text file")]
)
def test_load_binary_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "study.toml").write_bytes(content)
    with pytest.raises(InvalidInput, match=words):
        load(tmp_path / "study.toml")


def test_load_missing_file_says_how_to_begin(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match='no such file; "apportion init MODEL" writes one'):
        load(tmp_path / "study.toml")


def test_load_folder_names_the_file_in_it(folder: Path) -> None:
    (folder / "study.toml").write_text(LEAST)
    with pytest.raises(InvalidInput, match="is a folder; did you mean .*study.toml"):
        load(folder)


def test_load_least_file_gets_defaults(folder: Path) -> None:
    (folder / "study.toml").write_text(LEAST)
    spec = load(folder / "study.toml")
    assert spec.data.context == 512
    assert spec.devices["here"].request[0].tokens == 512
    assert (spec.search.windows, spec.search.solver, spec.objective.threads) == (64, "hybrid", 1)
    assert spec.study.name == "demo"
    assert spec.space[0].unfit == "skip"


def test_load_python_data_is_timed_forward(folder: Path) -> None:
    data = '[data]\nsource = "python:model.py:build"\nsamples = { search = 20 }\n'
    (folder / "cnn.toml").write_text(MODEL + data + LIMITS)
    spec = load(folder / "cnn.toml")
    assert spec.study.name == "cnn"
    assert spec.devices["here"].request[0].phase == "forward"
    assert (spec.search.windows, spec.search.stages) == (20, (8, 20))


def test_load_paths_become_absolute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "weights").mkdir()
    text = (
        LEAST.replace("hf:org/model", "weights") + '[objective]\nloss = "python:model.py:build"\n'
    )
    (folder / "study.toml").write_text(text)
    monkeypatch.chdir(folder.parent)
    spec = load(Path(folder.name) / "study.toml")
    assert spec.model.source == f"hf:{folder}/weights"
    assert spec.data.source == f"text:{folder}/corpus"
    assert spec.objective.loss == f"python:{folder}/model.py:build"


def test_start_files_become_absolute_and_owl_stays(folder: Path) -> None:
    (folder / "4.txt").write_text("layer: 4\n")
    (folder / "study.toml").write_text(LEAST + '[search]\nstart = ["owl", "4.txt"]\n')
    spec = load(folder / "study.toml")
    assert spec.search.start == ("owl", f"{folder}/4.txt")
    assert StudySpec(**spec.to_json()).absolute(Path("/elsewhere")) == spec
    (folder / "study.toml").write_text(LEAST + '[search]\nstart = "4.txt"\n')
    assert load(folder / "study.toml").search.start == (f"{folder}/4.txt",)


def test_spec_survives_json_and_keeps_its_hash(folder: Path) -> None:
    (folder / "study.toml").write_text(LEAST + SPACE)
    spec = load(folder / "study.toml")
    again = StudySpec(**spec.to_json())
    assert again == spec
    assert again.spec_hash == spec.spec_hash


def test_spec_in_python_takes_sections_and_refuses_in_words() -> None:
    spec = StudySpec(
        model=ModelSection(source="hf:org/model"),
        data=DataSection(source="text:corpus"),
        limits={"latency": {"here": "0.5x dense"}},
    )
    assert spec.parsed_limits[0].kind == "latency.here"
    with pytest.raises(InvalidInput, match="^model: missing"):
        StudySpec(data={"source": "text:corpus"}, limits={"bits": 3.5})


def test_difference_names_what_changed(folder: Path) -> None:
    (folder / "a.toml").write_text(LEAST + SPACE + '[study]\nname = "x"\n')
    (folder / "b.toml").write_text((folder / "a.toml").read_text().replace("w8", "w4g64"))
    old, new = load(folder / "a.toml"), load(folder / "b.toml")
    assert difference(old, old) == []
    assert difference(old, new) == ['space[1].options: ["dense", "w8"] -> ["dense", "w4g64"]']


def test_difference_new_key(folder: Path) -> None:
    (folder / "a.toml").write_text('[study]\nname = "x"\n' + LEAST)
    (folder / "b.toml").write_text('[study]\nname = "x"\n' + LEAST + "bits = 3.5\n")
    lines = difference(load(folder / "a.toml"), load(folder / "b.toml"))
    assert lines == ["limits.bits: not given -> 3.5"]


@pytest.mark.parametrize("source", ["hf:org/model", "python:model.py:build"])
def test_init_file_loads_as_it_is(folder: Path, source: str) -> None:
    (folder / "data.py").write_text("def load(part): ...\n")
    (folder / "study.toml").write_text(init_file(source))
    spec = load(folder / "study.toml")
    assert {"latency.here", "weight_bytes"} == set(spec.limits)


def test_init_file_context_fits_the_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 128}')
    (tmp_path / "corpus").mkdir()
    (tmp_path / "study.toml").write_text(init_file(str(tmp_path)))
    assert load(tmp_path / "study.toml").data.context == 128

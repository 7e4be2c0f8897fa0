"""Files made to do harm: to run code, to write elsewhere, to take memory that is not there."""

import ast
import bz2
import dataclasses
import gzip
import io
import json
import lzma
import os
import pickle
import resource
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import safetensors.numpy
import zstandard

import checkpoints
from tokmat_jax.commands import generate
from tokmat_jax.config import Config, DataConfig
from tokmat_jax.data import sources
from tokmat_jax.data.sources import files, records
from tokmat_jax.data.tokenizer import hugging_face, load_tokenizer, train_bpe
from tokmat_jax.errors import UserError
from tokmat_jax.generation.trajectory import load_trajectory
from tokmat_jax.hf.convert import import_weights
from tokmat_jax.hf.files import Safetensors
from tokmat_jax.storage.npy import open_npy
from tokmat_jax.storage.workdir import load_config, save_config
from trajectories import made_trajectory

ROOT = Path(__file__).resolve().parent.parent
CODE = [*sorted((ROOT / "tokmat_jax").rglob("*.py")), ROOT / "train.py", ROOT / "generate.py",
        *sorted((ROOT / "benchmarks").rglob("*.py")), *sorted((ROOT / "configs").rglob("*.py"))]
RUNNING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "jsonpickle", "runpy",
           "code", "codeop", "imp"}
"""Modules that run what they read."""
CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
         "pd.read_pickle", "os.system", "os.popen"}
TRUST = {"trust_remote_code", "allow_pickle", "shell"}
"""Arguments that must be False wherever they are given."""
ALLOWED = {("tokmat_jax/commands/flags.py", "runpy")}
"""`--config FILE`: the one Python file that is run is the one that the user names for that."""


def dangers(path: Path) -> set[str]:
    """What in a source could run something that was read."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names} & RUNNING
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.module or "").partition(".")[0]} & RUNNING
        elif isinstance(node, ast.Call):
            found |= {ast.unparse(node.func)} & CALLS
            found |= {str(word.arg) for word in node.keywords
                      if word.arg in TRUST and ast.unparse(word.value) != "False"}
    return found


def test_no_source_can_run_what_it_reads():
    assert len(CODE) > 60
    found = {(str(path.relative_to(ROOT)), danger) for path in CODE for danger in dangers(path)}
    assert found == ALLOWED


@pytest.mark.parametrize("line", [
    "import pickle", "from dill import loads", "eval(x)", "torch.load(f)", "np.load(f, allow_pickle=True)",
    "f(trust_remote_code=flags.trust)", "import joblib.numpy_pickle"])
def test_the_search_finds_what_it_looks_for(line, tmp_path):
    (tmp_path / "x.py").write_text(line)
    assert dangers(tmp_path / "x.py")


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def refused(call, *args, says: str = "") -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    message = str(caught.value)
    assert message.isprintable()
    assert says in message
    return message


def steering_vector(path: Path) -> np.ndarray | None:
    return generate.steering_vector(generate.Args("run", steering_vector=str(path)))


@pytest.mark.parametrize("read", [open_npy, steering_vector, load_trajectory])
def test_a_pickle_in_an_array_is_refused_and_not_run(read, tmp_path):
    trap, sprung = np.array([Trap(tmp_path / "sprung")], object), tmp_path / "sprung"
    np.save(tmp_path / "v.npy", trap, allow_pickle=True)
    np.load(tmp_path / "v.npy", allow_pickle=True)[0].close()
    sprung.unlink()  # the trap works
    np.savez(tmp_path / "v.npz", allow_pickle=True, **(made_trajectory() | {"prompt": trap}))
    (tmp_path / "plain.npy").write_bytes(pickle.dumps(Trap(sprung)))
    for name in ("v.npy", "v.npz", "plain.npy"):
        refused(read, tmp_path / name, says=name)
    assert not sprung.exists()


@pytest.mark.parametrize("changes", [
    {"auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}},
    {"auto_map": {"AutoTokenizer": [None, "mine.Mine"]}, "tokenizer_class": "Mine"},
    {"tokenizer_class": "tokenization_mine.Mine"}])
def test_a_checkpoint_does_not_run_the_code_that_comes_with_it(changes, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    checkpoints.write(folder)
    checkpoints.configure(folder, auto_map={"AutoConfig": "configuration_mine.Mine"})
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    for name in ("mine", "tokenization_mine", "configuration_mine", "__init__"):
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w').close()\nclass Mine: pass\n")
    said = []
    for read in (lambda: hugging_face(str(folder)), lambda: import_weights(str(folder), tmp_path / "out")):
        try:
            read()
        except UserError as error:
            said.append(str(error))
    assert all(message.isprintable() for message in said)
    assert not (tmp_path / "sprung").exists()
    assert not any(name in sys.modules for name in ("mine", "tokenization_mine", "configuration_mine"))


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside", "..", "", "sub/x.safetensors",
                                  "a\0b", "\ud800", "x" * 5000])
def test_a_shard_has_a_name_in_its_own_folder(name, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "sub").mkdir()
    for place in (tmp_path / "outside", folder / "sub" / "x.safetensors"):
        safetensors.numpy.save_file({"a": np.ones(2, np.float32)}, place)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    refused(Safetensors, folder, says="model.safetensors.index.json")


def test_names_in_a_checkpoint_write_nothing_elsewhere(tmp_path):
    folder = tmp_path / "deep" / "model"
    folder.mkdir(parents=True)
    checkpoints.write(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {
        "name_or_path": "../../../elsewhere", "tokenizer_file": "../../elsewhere.json",
        "vocab_file": str(tmp_path / "elsewhere")}))
    checkpoints.configure(folder, _name_or_path="../../elsewhere", name_or_path=str(tmp_path / "elsewhere"),
                          transformers_weights="../../elsewhere")
    before = {*tmp_path.rglob("*")}
    out = tmp_path / "deep" / "out"
    import_weights(str(folder), out)
    assert {path for path in {*tmp_path.rglob("*")} - before if not path.is_relative_to(out)} == set()


def in_little_memory(code: str, *paths: Path, room: int = 1 << 30) -> str:
    """What comes of `code` with each of `paths` as `path`, where `room` bytes can be had beyond what imports took."""
    program = f"""
import resource, sys
from pathlib import Path
import numpy, pyarrow.parquet, zstandard, generate
from tokmat_jax.config import DataConfig
from tokmat_jax.data import sources
from tokmat_jax.errors import UserError
from tokmat_jax.generation.trajectory import load_trajectory
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + {room}
resource.setrlimit(resource.RLIMIT_AS, (size, size))
for path in sys.argv[1:]:
    try:
        {code}
        print("read")
    except UserError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program, *map(str, paths)], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def bomb(pack, path: Path, size: int = 1 << 30) -> Path:
    """A file that unpacks to `size` bytes without a line's end."""
    piece = b"x" * (1 << 24)
    with pack(path, "wb") as stream:
        stream.write(b'{"text": "short"}\n{"text": "')
        for _ in range(size // len(piece)):
            stream.write(piece)
    return path


def npy_header(shape: tuple[int, ...], descr: str = "<f8") -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to know how much memory is taken")
def test_a_line_without_end_is_not_held(tmp_path):
    paths = [bomb(gzip.open, tmp_path / "a.jsonl.gz"), bomb(zstandard.open, tmp_path / "a.jsonl.zst"),
             bomb(zstandard.open, tmp_path / "a.txt.zst"), bomb(bz2.open, tmp_path / "a.jsonl.bz2"),
             bomb(lzma.open, tmp_path / "a.txt.xz")]
    assert max(path.stat().st_size for path in paths) < 4 << 20
    said = in_little_memory('list(sources.documents(DataConfig(source=f"files:{path}")))', *paths).splitlines()
    for path, line in zip(paths, said, strict=True):
        where = f"{path} line 2" if ".jsonl" in path.name else f"{path} document 1"
        assert line == f"{where} is longer than 128 MB, the limit for one document: split it, or "\
                       "give the string between the documents of a text (--data.separator)"


@pytest.mark.parametrize(("name", "content", "where"), [
    ("a.jsonl", b'{"text": "ab"}\n{"text": "abcdefghijklmno"}\n', "line 2"),
    ("a.jsonl", b'{"text": "ab"}\n\n[' + b" " * 99, "line 3"),
    ("a.txt", b"ab<|endoftext|>abcdefghijklmnopqrstuvwxyz", "document 2"),
])
def test_a_document_that_is_too_long_is_named(name, content, where, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LONGEST", 20)
    monkeypatch.setattr(files, "_CHUNK", 7)
    (tmp_path / name).write_bytes(content)
    config = DataConfig(source=f"files:{tmp_path / name}")
    refused(list, sources.documents(config), says=f"{tmp_path / name} {where} is longer than")
    monkeypatch.setattr(records, "LONGEST", 1000)
    if name == "a.txt":
        assert list(sources.documents(config)) == ["ab", "abcdefghijklmnopqrstuvwxyz"]


def test_a_record_of_parquet_that_is_too_long_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LONGEST", 20)
    pyarrow.parquet.write_table(pa.table({"text": ["a", "b" * 21]}), tmp_path / "a.parquet")
    config = DataConfig(source=f"files:{tmp_path}/a.parquet")
    refused(list, sources.documents(config), says=f"{tmp_path}/a.parquet record 1 is longer than")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to know how much memory is taken")
def test_what_a_header_claims_is_not_taken(tmp_path):
    # One text of 100 MB in three kilobytes, which 4,000 rows share: 400 GB.
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 4000, pa.int32()), pa.array(["x" * (100 << 20)]))
    pyarrow.parquet.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", compression="zstd",
                                dictionary_pagesize_limit=1 << 30, store_schema=False)
    del texts
    assert (tmp_path / "a.parquet").stat().st_size < 1 << 20
    said = in_little_memory('next(sources.documents(DataConfig(source=f"files:{path}")))', tmp_path / "a.parquet",
                            room=3 << 30)
    assert said == "read\n"


@pytest.mark.parametrize("shape", [(2**40,), (2**31, 2**31), (2**62, 4), (2**63, 2), (10**30,), (0, 2**63), (-1,),
                                   (True,)])
def test_a_vector_has_the_numbers_that_its_header_claims(shape, tmp_path):
    (tmp_path / "v.npy").write_bytes(npy_header(shape) + bytes(64))
    refused(steering_vector, tmp_path / "v.npy", says="v.npy is no .npy file of numbers")


@pytest.mark.parametrize("header", [
    b"(" * 5000, b"-" * 9000, b"{'descr': '<f8', 'fortran_order': False, 'shape': (" + b"1," * 4000 + b")}",
    b"{'descr': [('a', 'O')], 'fortran_order': False, 'shape': (1,)}",
    b"{'descr': '<f8', 'fortran_order': False, 'shape': (__import__('os').getpid(),)}"])
def test_a_vector_with_a_header_of_another_kind_is_refused(header, tmp_path):
    (tmp_path / "v.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(64))
    refused(steering_vector, tmp_path / "v.npy", says="v.npy is no .npy file of numbers")


def trajectory_with(path: Path, content: bytes, times: int = 1, method: int = zipfile.ZIP_DEFLATED) -> Path:
    """A trajectory whose vectors are `content` written `times` times."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, array in made_trajectory().items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as opened:
                if name == "vectors":
                    for _ in range(times):
                        opened.write(content)
                else:
                    np.save(opened, array)
    return path


def test_a_trajectory_does_not_unpack_to_more_than_it_may(tmp_path):
    path = trajectory_with(tmp_path / "t.npz", bytes(1 << 20), 200)
    assert path.stat().st_size < 1 << 19
    refused(load_trajectory, path, says="would unpack to 209,7")
    trajectory_with(path, npy_header((3, 2, 2**50)) + bytes(64))
    refused(load_trajectory, path, says="vectors.npy does not hold the numbers that its header says")
    trajectory_with(path, npy_header((3, 2, 1)) + bytes(48), method=zipfile.ZIP_LZMA)
    refused(load_trajectory, path, says="packed in a way that NumPy does not use")


def test_a_trajectory_may_be_large_where_its_file_is(tmp_path):
    made = made_trajectory() | {"vectors": np.random.default_rng(0).normal(size=(3, 2, 2**20 + 2**19))}
    np.savez(tmp_path / "t.npz", **made)
    assert load_trajectory(tmp_path / "t.npz").vectors.nbytes > 64 << 20


def test_a_trajectorys_members_that_say_less_than_they_hold_are_cut(tmp_path):
    whole = trajectory_with(tmp_path / "t.npz", npy_header((3, 2, 4)) + bytes(192)).read_bytes()
    size = len(npy_header((3, 2, 4))) + 192
    for claimed in (0, size - 8, size + 8, 2**31):
        (tmp_path / "t.npz").write_bytes(whole.replace(struct.pack("<I", size), struct.pack("<I", claimed)))
        refused(load_trajectory, tmp_path / "t.npz", says="t.npz is no trajectory")


def test_a_tokenizer_has_no_id_of_any_size(tmp_path):
    train_bpe(["the cat"], 260).save(tmp_path)
    meta = tmp_path / "tokenizer_meta.json"
    for facts, says in (({"vocab_size": 2**40}, "1,099,511,627,776 ids is not supported"),
                        ({"end_of_text": 10**9}, "end-of-text (1000000000,)"),
                        ({"end_of_text": -1}, "end-of-text (-1,)"),
                        ({"prefix": [2**31]}, "prefix (2147483648,)"), ({"prefix": "ab"}, "no usable tokenizer")):
        meta.write_text(json.dumps({"end_of_text": 0, "prefix": [], "vocab_size": 260} | facts))
        refused(load_tokenizer, tmp_path, says=says)
    meta.write_text('{"end_of_text": 0, "prefix": [], "vocab_size": 260}')
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["model"]["vocab"]["far"] = 2**32 - 1
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    refused(load_tokenizer, tmp_path, says="no usable tokenizer")


@pytest.mark.parametrize("fields", [
    {"num_hidden_layers": 2**40}, {"num_hidden_layers": 1e12}, {"num_labels": 2**40}, {"hidden_size": 2**40},
    {"num_attention_heads": 2**50}, {"vocab_size": 2**45},
    {"intermediate_size": 2**62}, {"head_dim": 2**45}, {"num_key_value_heads": 0}, {"hidden_size": -8},
    {"num_hidden_layers": 4097}, {"hidden_size": 2**63}])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_checkpoints_config_takes_no_memory_for_what_it_claims(model_type, fields, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    checkpoints.write(folder)
    checkpoints.configure(folder, model_type=model_type, **fields)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(import_weights, str(folder), tmp_path / "out")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["num_layers", "embed_dim", "mlp_dim", "head_dim", "max_positions"])
def test_a_runs_config_takes_no_memory_for_what_it_claims(name, tmp_path):
    save_config(Config(), tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    for value in (2**25, 2**40, 2**63):
        data["model"][name] = value
        (tmp_path / "config.json").write_text(json.dumps(data))
        refused(load_config, tmp_path, says=f"model.{name}")


def gguf_of(*parts: bytes, num_weights: int = 0, num_facts: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_weights, num_facts) + b"".join(parts)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def fact(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def weight(name: bytes, kind: int, offset: int, *shape: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


ARCHITECTURE = fact(b"general.architecture", 8, text(b"llama"))
GGUF = {
    "no weights that it counts": gguf_of(num_weights=2**60),
    "no metadata that it counts": gguf_of(num_facts=2**63),
    "a string longer than the file": gguf_of(struct.pack("<Q", 2**62), num_facts=1),
    "an array longer than the file": gguf_of(fact(b"a", 9, struct.pack("<IQ", 4, 2**61)), num_facts=1),
    "an array of bytes without end": gguf_of(fact(b"a", 9, struct.pack("<IQ", 0, 2**64 - 1)), num_facts=1),
    "an array of strings without end": gguf_of(fact(b"a", 9, struct.pack("<IQ", 8, 2**22)), num_facts=1),
    "arrays of many values": gguf_of(fact(b"a", 9, struct.pack("<IQ", 0, 2**22 + 1)), bytes(2**22 + 1), num_facts=1),
    "arrays in arrays": gguf_of(fact(b"a", 9, struct.pack("<IQ", 9, 1) * 2000), num_facts=1),
    "a weight longer than the file": gguf_of(ARCHITECTURE, weight(b"output.weight", 0, 0, 2**40, 2**20),
                                             num_facts=1, num_weights=1),
    "a shape that overflows": gguf_of(ARCHITECTURE, weight(b"output.weight", 0, 0, 2**32, 2**32), num_facts=1,
                                      num_weights=1),
    "a weight behind the file": gguf_of(ARCHITECTURE, weight(b"output.weight", 0, 2**63, 4), bytes(64), num_facts=1,
                                        num_weights=1),
    "many axes": gguf_of(ARCHITECTURE, text(b"output.weight") + struct.pack("<I", 2**31), num_facts=1, num_weights=1),
    "no axes": gguf_of(ARCHITECTURE, weight(b"output.weight", 0, 0), bytes(64), num_facts=1, num_weights=1),
    "half a block": gguf_of(ARCHITECTURE, weight(b"output.weight", 8, 0, 33), bytes(256), num_facts=1, num_weights=1),
    "an alignment of nothing": gguf_of(fact(b"general.alignment", 4, struct.pack("<I", 0)), num_facts=1),
    "a name twice": gguf_of(ARCHITECTURE, ARCHITECTURE, num_facts=2),
    "a weight twice": gguf_of(ARCHITECTURE, weight(b"output.weight", 0, 0, 4) * 2, bytes(64), num_facts=1,
                              num_weights=2),
    "a name for a terminal": gguf_of(ARCHITECTURE, weight(b"\x1b[2J", 0, 0, 4), bytes(64), num_facts=1, num_weights=1),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "another version": gguf_of(version=1),
}


@pytest.mark.parametrize("case", GGUF)
def test_a_gguf_header_is_held_against_its_file(case, tmp_path):
    pytest.importorskip("gguf", reason="GGUF files need gguf: pip install -e '.[gguf]'")
    (tmp_path / "a.gguf").write_bytes(GGUF[case])
    refused(import_weights, str(tmp_path / "a.gguf"), tmp_path / "out", says=f"{tmp_path / 'a.gguf'} is damaged: ")


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**40, 100_000_001, 2**31, 0, 1])
def test_a_safetensors_header_is_held_against_its_file(length, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}" + bytes(64))
    refused(Safetensors, tmp_path, says="model.safetensors is damaged")


def test_a_weight_of_safetensors_lies_in_its_file(tmp_path):
    for shape, places in (([2**40], [0, 2**42]), ([4], [0, 2**42]), ([2**62, 4], [0, 16]), ([4], [16, 0])):
        header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": places}}).encode()
        (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
        refused(Safetensors, tmp_path, says="model.safetensors is damaged")


def test_a_parquet_file_whose_metadata_would_end_the_process_is_refused(tmp_path):
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pa.table({"text": ["a", "b"]}), stream)
    whole = stream.getvalue()
    size = struct.unpack("<I", whole[-8:-4])[0]
    footer = len(whole) - 8 - size
    code = "sources.units(DataConfig(source=f'files:{path}'))"
    paths = []
    for index in range(footer, footer + size, 3):
        paths.append(tmp_path / f"{index}.parquet")
        paths[-1].write_bytes(whole[:index] + bytes([whole[index] ^ 0x55]) + whole[index + 1:])
    assert len(in_little_memory(code, *paths).splitlines()) == len(paths)


def test_the_made_trajectory_is_a_trajectory(tmp_path):
    np.savez(tmp_path / "t.npz", **made_trajectory())
    found = dataclasses.asdict(load_trajectory(tmp_path / "t.npz"))
    for name, array in made_trajectory().items():
        np.testing.assert_array_equal(found[name], array)

"""Corpora made by several processes, by runs that were killed, and by several runs at once."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from corpora import config_of_files, left
from tokmat_jax.commands import data as command
from tokmat_jax.data import corpus, making, pool, tokenising, windows
from tokmat_jax.data.corpus import prepare
from tokmat_jax.data.sources import parquet
from tokmat_jax.errors import UserError


def texts(name, count):
    return [f"{name} number {index} says {'abc ' * (index % 9)}" for index in range(count)]


def write_files(folder):
    for name in ("a", "b", "c"):
        (folder / f"{name}.txt").write_text("<|endoftext|>".join(texts(name, 30)))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(name, 20)))
        pyarrow.parquet.write_table(pa.table({"text": texts(name, 50)}), folder / f"{name}.parquet", row_group_size=20)


def flags(config):
    return ["--data.source", config.data.source, "--data.seq-len", "16", "--data.holdout", "0.2", "--data.prepared-dir",
            config.data.prepared_dir, "--tokenizer.vocab-size", str(config.tokenizer.vocab_size),
            "--maturation.max-tail-length", "4"]


def content(corpus):
    """Every file of a corpus, byte for byte."""
    return {path.relative_to(corpus.folder): path.read_bytes() for path in corpus.folder.rglob("*") if path.is_file()}


def start(*words):
    return subprocess.Popen([sys.executable, *words], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_any_number_of_workers_makes_the_same_corpus(tmp_path, monkeypatch):
    write_files(tmp_path)
    monkeypatch.setattr(windows, "_SHARD", 64 * 16)  # several files of windows, so that workers write them too
    monkeypatch.setattr(parquet, "_UNIT_BYTES", 1)
    one, three = (prepare(config_of_files(tmp_path, name), workers) for name, workers in (("one", 1), ("three", 3)))
    assert len(list((one.folder / "windows").glob("*train*"))) > 2
    assert content(one) == content(three)


_KILLED = """
import os, signal, sys
from pathlib import Path
from tests import corpora
from tokmat_jax.data import tokenising
from tokmat_jax.data.corpus import prepare

original, made = tokenising._tokenise_unit, []

def killed(*args):
    if len(made) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    made.append(original(*args))
    return made[-1]

tokenising._tokenise_unit = killed
prepare(corpora.config_of_files(Path(sys.argv[1])))
"""


def test_a_killed_preparation_is_gone_on_with(tmp_path, monkeypatch):
    write_files(tmp_path)
    whole = content(prepare(config_of_files(tmp_path, "whole")))
    killed = start("-c", _KILLED, str(tmp_path))
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    (unfinished,) = (tmp_path / "prepared").glob("unfinished-*[!k]")
    assert len(list(unfinished.glob("units/*.json"))) == 3
    # One that a power failure cut short does not count as finished.
    with next(unfinished.glob("units/000001.train.ids")).open("ab") as cut:
        cut.truncate(8)
    original, again = tokenising._tokenise_unit, []

    def noted(tokenizer, report, job):
        again.append(job.index)
        return original(tokenizer, report, job)

    monkeypatch.setattr(tokenising, "_tokenise_unit", noted)
    monkeypatch.setattr(making, "make_tokenizer", lambda *_: pytest.fail("the tokenizer was trained again"))
    made = prepare(config_of_files(tmp_path))
    assert again == [1, *range(3, 9)]
    assert content(made) == whole
    assert left(tmp_path / "prepared") == [made.folder]


def children(pid):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return {int(word) for word in found.stdout.split()}


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_no_worker_outlives_its_run(tmp_path, blow):
    for index in range(60):
        (tmp_path / f"{index}.txt").write_text("some words of a text " * 10_000)
    config = config_of_files(tmp_path, pattern="*.txt", kind="bytes")
    run = start("-m", "tokmat_jax", "data", "prepare", "--workers", "2", *flags(config), "--tokenizer.kind", "bytes")
    while run.poll() is None and not list(tmp_path.glob("prepared/unfinished-*/units/*.json")):
        time.sleep(0.01)
    workers = children(run.pid)
    run.send_signal(blow)
    _, said = run.communicate(timeout=60)
    assert len(workers) >= 2
    assert run.returncode == (-signal.SIGKILL if blow == signal.SIGKILL else 130), said
    assert "Traceback" not in said
    deadline = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))


def test_a_mistake_found_by_a_worker_is_one_line(tmp_path):
    write_files(tmp_path)
    (tmp_path / "b.jsonl").write_text('{"text": "fine"}\n{nonsense\n')
    with pytest.raises(UserError, match=r"b\.jsonl line 2 is not JSON") as caught:
        prepare(config_of_files(tmp_path, kind="bytes"), 2)
    assert "\n" not in str(caught.value)


def test_a_worker_that_dies_is_one_line():
    with pytest.raises(UserError, match="one of 2 workers died"), pool.processes(2) as run:
        list(run(os._exit, [1]))


def test_runs_that_want_the_same_corpus_at_once_make_it_once(tmp_path, capfd, monkeypatch):
    write_files(tmp_path)
    original, made = corpus.make, []

    def slow(*args):
        made.append(args)
        time.sleep(0.5)
        original(*args)

    monkeypatch.setattr(corpus, "make", slow)
    with ThreadPoolExecutor(3) as threads:
        folders = [each.folder for each in threads.map(prepare, [config_of_files(tmp_path)] * 3)]
    assert len(made) == 1
    assert [folders[0]] * 3 == folders
    assert left(tmp_path / "prepared") == [folders[0]]
    assert capfd.readouterr().err.count("waiting for another process") == 2


def test_units_of_another_cut_are_not_mixed_in(tmp_path, monkeypatch):
    write_files(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(making, "write_windows", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(config_of_files(tmp_path))
    monkeypatch.setattr(parquet, "_UNIT_BYTES", 1)
    assert prepare(config_of_files(tmp_path)).facts["documents"] == 300


@pytest.mark.parametrize("seq_len", [3, 16, 1000])
def test_windows_do_not_depend_on_how_the_ids_lie_in_files(tmp_path, monkeypatch, seq_len):
    monkeypatch.setattr(windows, "_BLOCK", 7)
    stream, parts = np.arange(2500, dtype=np.int32), []
    for index, piece in enumerate(np.split(stream, [0, 5, 400, 401, 2000])):
        piece.tofile(tmp_path / f"{index}.ids")
        parts.append((tmp_path / f"{index}.ids", 0, piece.size))
    ids = windows.Ids(tuple(parts)).piece(3, 2400)
    got = np.concatenate(list(windows._windows(ids, seq_len)))
    np.testing.assert_array_equal(got.reshape(-1), stream[3:2400][: 2397 // seq_len * seq_len])
    assert windows.last_of(450, ids, 10, 2000) == 447
    assert windows.last_of(450, ids, 10, 447) is None


def test_the_command_makes_what_the_library_finds(tmp_path, capsys):
    write_files(tmp_path)
    config = config_of_files(tmp_path)
    command.main(["prepare", "--workers=1", *flags(config)])
    said = capsys.readouterr().out
    made = prepare(config)
    assert said.startswith(f"corpus {made.folder}: 300 documents, ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(("args", "says"), [
    ([], "no command given"),
    (["tokenise"], "unknown command 'tokenise'; there are prepare, batch and own"),
    (["prepare", "--workers", "0"], "--workers must be at least 1, found 0"),
    (["prepare", "--workers", "many"], "many"),
    (["prepare", "--workers"], "--workers"),
    (["prepare", "--data.sorce", "x"], "nearest: --data.source"),
])
def test_a_mistake_on_the_command_line_is_one_line(args, says):
    with pytest.raises(UserError, match=says) as caught:
        command.main(args)
    assert "\n" not in str(caught.value)


_GROWTH = """
import dataclasses, resource, sys
from pathlib import Path
from tests import corpora
from tokmat_jax.data.corpus import prepare

for pattern in ("small.parquet", "large.parquet"):
    config = corpora.config_of_files(Path(sys.argv[1]), pattern=pattern, kind="bytes")
    prepare(dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=1024)))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def write_parquet(path, megabytes):
    words = np.random.default_rng(0).integers(97, 123, (1000, 3000), np.uint8)
    table = pa.table({"text": [row.tobytes().decode() for row in words]})
    with pyarrow.parquet.ParquetWriter(path, table.schema) as writer:
        for _ in range(max(1, megabytes // 3)):
            writer.write_table(table)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """120 MB more of text are 480 MB more of ids: held whole, either would show. The first corpus fills buffers and
    heap; what may differ are the mapped pages of a unit, which count until the system wants them back."""
    write_parquet(tmp_path / "small.parquet", 60)
    write_parquet(tmp_path / "large.parquet", 180)
    run = start("-c", _GROWTH, str(tmp_path))
    said, wrong = run.communicate(timeout=1200)
    assert run.returncode == 0, wrong
    small, large = said.split()
    assert int(large) - int(small) < 120e6, said

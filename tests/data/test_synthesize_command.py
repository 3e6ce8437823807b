"""gossamer data synthesize, and a generator behind an address."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load, save

from gossamer.cli import app, main
from gossamer.core.errors import InputError
from gossamer.data.http_generator import HttpGenerator


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Private images are dark or light; public ones have every grey."""
    random = np.random.default_rng(0)
    for side, count in (("private", 80), ("public", 60)):
        for name in ("dark", "light"):
            (tmp_path / side / name).mkdir(parents=True)
            for number in range(count):
                grey = {"dark": 40, "light": 210}[name] if side == "private" else number * 4
                pixels = random.normal(grey, 4, (8, 8)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / side / name / f"{number:02}.png")
    return tmp_path


def run(*words: str | Path | float) -> None:
    app(list(map(str, words)), result_action="return_value", exit_on_error=False)


def fails(capsys: pytest.CaptureFixture[str], monkeypatch, *words: str | Path | float) -> str:
    monkeypatch.setattr("sys.argv", ["gossamer", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    said = capsys.readouterr().err
    return said[said.index("gossamer: ") :]


def greys(folder: Path) -> np.ndarray:
    return np.array([np.asarray(Image.open(file)).mean() for file in sorted(folder.glob("*.png"))])


SMALL = ("--iterations", 3, "--lookahead", 1, "--epsilon", 10, "--delta", 1e-3, "--embed", "pixels")


def test_a_pool_is_steered(folders: Path, capsys) -> None:
    out = folders / "synthetic"
    words = (folders / "private", "--pool", folders / "public", "--out", out, "--count", 16, *SMALL)
    run("data", "synthesize", *words, "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["epsilon_spent"] == pytest.approx(10.0) and report["epsilon_spent"] <= 10.0
    assert report["epsilon_dp_accounting"] == pytest.approx(10.0, rel=0.02)
    assert report["releases_in_ledger"] == 3 and report["images"] == 16
    dark, light = greys(out / "dark"), greys(out / "light")
    assert len(dark) == len(light) == 8
    assert dark.mean() < 95 < 150 < light.mean()  # the pool's mean is 118 in both
    # The budget stays spent after the images are thrown away.
    (out / "report.json").unlink()
    out.rename(folders / "old")
    run("data", "synthesize", *words, "--json")
    assert json.loads(capsys.readouterr().out)["releases_in_ledger"] == 3


def test_bad_input(folders: Path, capsys, monkeypatch) -> None:
    base = ("data", "synthesize", folders / "private", "--out", folders / "out")
    pool = ("--pool", folders / "public")
    said = fails(capsys, monkeypatch, *base)
    assert "give either --pool with public images or --url" in said
    said = fails(capsys, monkeypatch, *base, *pool, "--epsilon", 0)
    assert "epsilon must be above 0" in said
    said = fails(capsys, monkeypatch, *base, *pool, "--delta", 1)
    assert "delta must lie strictly between 0 and 1" in said
    said = fails(capsys, monkeypatch, *base, *pool, "--delta", 0.5, "--count", 10)
    assert "no promise to 160 private samples" in said
    said = fails(capsys, monkeypatch, *base, *pool, "--count", 1)
    assert "class 0 gets none of 1 samples" in said
    said = fails(capsys, monkeypatch, *base, *pool, "--threshold", "high")
    assert '--threshold is "auto"' in said
    said = fails(
        capsys, monkeypatch, *base, "--url", "ftp://here", "--image-size", 8, "--channels", 1
    )
    assert "no http or https address" in said
    (folders / "public" / "light").rename(folders / "public" / "pale")
    said = fails(capsys, monkeypatch, *base, *pool)
    assert "the public pool has no class light" in said
    assert said.count("\n") == 1 and not (folders / "out").exists()


Answer = Callable[[str, np.ndarray, np.ndarray | None, dict[str, str]], bytes | int]


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], str]]:
    """Starts a generator that answers as told."""
    running: list[ThreadingHTTPServer] = []

    def start(answer: Answer) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                tensors = load(body)
                samples = tensors.get("samples")
                length = int.from_bytes(body[:8], "little")
                about = json.loads(body[8 : 8 + length])["__metadata__"]
                content = answer(
                    self.path, tensors["labels"].numpy(),
                    None if samples is None else samples.numpy(), about,
                )  # fmt: skip
                code = content if isinstance(content, int) else 200
                self.send_response(code)
                if code == 302:
                    self.send_header("Location", "http://127.0.0.1:1/elsewhere")
                self.end_headers()
                if isinstance(content, bytes):
                    self.wfile.write(content)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        running.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def packed(samples: np.ndarray) -> bytes:
    return save({"samples": torch.from_numpy(samples)})


def test_the_contract_of_an_address(serve) -> None:
    seen: list[tuple[str, dict[str, str]]] = []

    def answer(path, labels, samples, about) -> bytes:
        seen.append((path, about))
        if samples is None:
            random = np.random.default_rng(int(about["seed"]))
            return packed(
                random.integers(0, 9, (len(labels), 1, 2, 2)).astype(np.uint8)
                + 10 * labels.astype(np.uint8)[:, None, None, None]
            )
        return packed(samples + np.uint8(float(about["degree"])))

    api = HttpGenerator(serve(answer), (1, 2, 2), batch_size=4)
    labels = np.repeat([0, 1, 2], 3)
    drawn = api.random(labels, seed=5)
    assert (drawn.reshape(9, -1).max(1) // 10 == labels).all()
    assert np.array_equal(drawn, api.random(labels, seed=5))
    varied = api.variation(drawn, labels, 3.0, seed=1)
    assert np.array_equal(varied, drawn + 3)
    assert [path for path, _ in seen] == ["/random"] * 6 + ["/variation"] * 3
    assert len({about["seed"] for path, about in seen[:3]}) == 3


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (404, "gave no samples"),
        (302, "gave no samples"),
        (b"\x80\x04pickle", "answers no safetensors"),
        (b"x" * 200_000, "answers more than"),
        (packed(np.zeros((2, 1, 2, 2), np.uint8)), "was asked for"),
        (packed(np.zeros((3, 1, 2, 2), np.float32)), "was asked for"),
        (save({"images": torch.zeros(3)}), "answers no safetensors with samples"),
    ],
)
def test_wrong_answers_are_one_sentence(serve, answer, sentence: str) -> None:
    api = HttpGenerator(serve(lambda *_: answer), (1, 2, 2), attempts=1)
    with pytest.raises(InputError, match=sentence) as problem:
        api.random(np.zeros(3, dtype=np.int64), seed=0)
    assert "\n" not in str(problem.value)


def test_answers_must_be_finite_and_come(serve) -> None:
    infinite = packed(np.full((2, 3), np.inf, np.float32))
    api = HttpGenerator(serve(lambda *_: infinite), (3,), dtype="float32")
    with pytest.raises(InputError, match="not finite"):
        api.random(np.zeros(2, dtype=np.int64), seed=0)
    silent = threading.Event()
    api = HttpGenerator(
        serve(lambda *_: packed(np.zeros((2, 3), np.float32)) if silent.wait(2.0) else 500),
        (3,), dtype="float32", timeout=0.2, attempts=1,
    )  # fmt: skip
    with pytest.raises(InputError, match="timed out"):
        api.random(np.zeros(2, dtype=np.int64), seed=0)


def test_an_address_is_steered(folders: Path, serve, capsys) -> None:
    def answer(path, labels, samples, about) -> bytes:
        random = np.random.default_rng(int(about["seed"]))
        if samples is None:
            return packed(
                np.repeat(random.integers(0, 256, (len(labels), 1, 1, 1)), 64)
                .reshape(-1, 1, 8, 8)
                .astype(np.uint8)
            )
        step = random.normal(0.0, 30.0 * float(about["degree"]), (len(labels), 1, 1, 1))
        return packed((samples + step).clip(0, 255).astype(np.uint8))

    out = folders / "synthetic"
    run(
        "data", "synthesize", folders / "private", "--url", serve(answer), "--image-size", 8,
        "--channels", 1, "--out", out, "--count", 16, *SMALL, "--json",
    )  # fmt: skip
    assert json.loads(capsys.readouterr().out)["private"] is True
    assert greys(out / "dark").mean() < 100 < 140 < greys(out / "light").mean()

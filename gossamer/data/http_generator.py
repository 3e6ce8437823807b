"""A generator behind an address.

The contract: ``POST URL/random`` and ``POST URL/variation``, both with a body in the safetensors
format. A request holds ``labels`` (int64 ``[n]``) and, for a variation, ``samples`` (``[n, ...]``);
its header's metadata holds ``seed`` and, for a variation, ``degree``, as text. The answer is 200
with a body in the same format that holds ``samples``: ``n`` of them, all of the same shape and
type (uint8 or float32) in every answer. Only synthetic samples and labels are ever sent.
"""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from typing import IO, Any
from urllib.parse import urlsplit

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from gossamer.core.errors import InputError, first_line

HEADER_BYTES = 1 << 16
"""What an answer may be larger than its samples."""


class HttpGenerator:
    """A :class:`gossamer.data.generators.Generator` that asks an address.

    Args:
        url: of the generator: http or https.
        shape: of one sample.
        dtype: of samples: "uint8" or "float32".
        schedule: first and last degree; degrees in between are spaced evenly.
        batch_size: samples a request.
        timeout: seconds without a byte after which a request has failed.
        attempts: tries of a request before giving up; a run that is started again goes on.
        headers: sent with every request, such as one that identifies the caller.
    """

    def __init__(
        self,
        url: str,
        shape: Sequence[int],
        *,
        dtype: str = "uint8",
        schedule: tuple[float, float] = (1.0, 0.4),
        batch_size: int = 64,
        timeout: float = 60.0,
        attempts: int = 3,
        headers: dict[str, str] | None = None,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise InputError(f"{url} is no http or https address of a generator")
        if dtype not in ("uint8", "float32"):
            raise InputError(f"samples are uint8 or float32, not {dtype}")
        if batch_size < 1 or attempts < 1 or timeout <= 0.0:
            raise InputError("batch size, attempts and timeout must be above 0")
        self.url = url.rstrip("/")
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        self.schedule = schedule
        self.batch_size = batch_size
        self.timeout = timeout
        self.attempts = attempts
        self.headers = dict(headers or {})
        # A redirect could carry the request to a place that the user did not name.
        self._opener = urllib.request.build_opener(_NoRedirect)

    def random(self, labels: np.ndarray, *, seed: int) -> np.ndarray:
        """A fresh sample of each label."""
        return self._batched("random", None, labels, {}, seed)

    def variation(
        self, samples: np.ndarray, labels: np.ndarray, degree: float, *, seed: int
    ) -> np.ndarray:
        """A variant of each sample."""
        return self._batched("variation", samples, labels, {"degree": repr(float(degree))}, seed)

    def degrees(self, iterations: int) -> list[float]:
        """From the first to the last degree of the schedule, evenly."""
        return [float(degree) for degree in np.linspace(*self.schedule, iterations + 1)]

    def _batched(
        self,
        verb: str,
        samples: np.ndarray | None,
        labels: np.ndarray,
        metadata: dict[str, str],
        seed: int,
    ) -> np.ndarray:
        out = np.empty((len(labels), *self.shape), dtype=self.dtype)
        starts = range(0, len(labels), self.batch_size)
        seeds = np.random.SeedSequence(seed).generate_state(len(starts))
        for start, own in zip(starts, seeds, strict=True):
            part = slice(start, start + self.batch_size)
            tensors = {"labels": torch.from_numpy(labels[part].astype(np.int64))}
            if samples is not None:
                tensors["samples"] = torch.from_numpy(np.ascontiguousarray(samples[part]))
            body = save(tensors, {**metadata, "seed": str(int(own))})
            out[part] = self._checked(verb, self._ask(verb, body, len(labels[part])), out[part])
        return out

    def _ask(self, verb: str, body: bytes, count: int) -> bytes:
        limit = count * int(np.prod(self.shape)) * self.dtype.itemsize + HEADER_BYTES
        request = urllib.request.Request(
            f"{self.url}/{verb}",
            data=body,
            headers={"Content-Type": "application/octet-stream", **self.headers},
            method="POST",
        )
        content = b""
        for attempt in range(self.attempts):
            try:
                with self._opener.open(request, timeout=self.timeout) as answer:
                    content = answer.read(limit + 1)
                break
            except (urllib.error.URLError, HTTPException, OSError) as error:
                code = getattr(error, "code", 500)
                if attempt + 1 == self.attempts or 300 <= code < 500:
                    raise InputError(
                        f"{self.url}/{verb} gave no samples: {first_line(error)}; look at the "
                        "generator, then run again to go on"
                    ) from error
                time.sleep(min(2.0**attempt, 10.0))
        if len(content) > limit:
            raise InputError(f"{self.url}/{verb} answers more than {limit:,} bytes; look at shape")
        return content

    def _checked(self, verb: str, content: bytes, wanted: np.ndarray) -> np.ndarray:
        try:
            samples = load(content)["samples"].numpy()
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{self.url}/{verb} answers no safetensors with samples: {first_line(error)}"
            ) from error
        if samples.shape != wanted.shape or samples.dtype != wanted.dtype:
            raise InputError(
                f"{self.url}/{verb} answers {samples.dtype} {list(samples.shape)}, and "
                f"{wanted.dtype} {list(wanted.shape)} was asked for"
            )
        if not np.isfinite(samples).all():
            raise InputError(f"{self.url}/{verb} answers samples that are not finite")
        return samples


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any,
        newurl: str,
    ) -> None:  # fmt: skip
        return None

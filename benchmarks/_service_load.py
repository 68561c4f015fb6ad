"""Latencies of a running diagnosis service, for hospitals that all ask at once."""

from __future__ import annotations

import http.client
import threading
import time
from urllib.parse import urlsplit

import numpy as np
import psutil

from primia_lite.apps.service import RemoteServer
from primia_lite.config import UserError
from primia_lite.encrypted.wire import join, split


def load_test(
    url: str, model: str | None = None, *, clients: int = 8, requests: int = 1000, pid: int | None = None
) -> dict:
    """Each hospital has keys, a session and a connection of its own, and encrypts one film beforehand: the time is
    from the first byte sent to the last received. Random features or pixels; the last reply of each is decrypted.

    Parameters
    ----------
    requests : of all clients together
    pid : of the service, if it runs here: memory of it and its workers is read in between

    Returns
    -------
    dict
        ``ms``, float64 [requests without an error]; ``errors``, sentences; ``films`` and ``logits`` [clients, ...];
        ``rss_mib``, before and after each tenth of the requests, empty without ``pid``
    """
    if (address := urlsplit(url)).scheme != "http":
        raise UserError(f"{url}: a load test takes a service without TLS, at http://")
    remotes = [RemoteServer(url, model) for _ in range(clients)]
    films = np.random.default_rng(0).random((clients, *remotes[0].client.packing.in_shape))
    films /= np.linalg.norm(films.reshape(clients, -1), axis=1).reshape(-1, *[1] * (films.ndim - 1))
    ms, errors, replies, rss_mib = [], [], {}, [] if pid is None else [_rss_mib(pid)]

    bodies = [join(remote.client.encrypt(film)) for remote, film in zip(remotes, films, strict=True)]
    paths = [f"/sessions/{remote.open()}/diagnose" for remote in remotes]

    def hospital(number: int) -> None:
        # Thinner than the client's library, whose own work would be timed.
        line, path, body = http.client.HTTPConnection(address.netloc), paths[number], bodies[number]
        for query in range(requests // clients + (number < requests % clients)):
            try:
                started = time.perf_counter()
                line.request("POST", path, body=body)
                answer = line.getresponse()
                content = answer.read()
                passed = 1e3 * (time.perf_counter() - started)
            except (OSError, http.client.HTTPException) as error:
                line.close()
                errors.append(f"{type(error).__name__}: {error}")
                continue
            if answer.status != 200:
                errors.append(f"{answer.status}: {content[:200]!r}")
                continue
            ms.append(passed)
            replies[number] = content
            if pid is not None and number == 0 and (query + 1) % max(1, requests // (10 * clients)) == 0:
                rss_mib.append(_rss_mib(pid))

    threads = [threading.Thread(target=hospital, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    logits = [remote.client.decrypt(split(replies[k])) for k, remote in enumerate(remotes) if k in replies]
    for remote in remotes:
        remote.close()
    return {"ms": np.array(ms), "errors": errors, "films": films, "logits": np.array(logits), "rss_mib": rss_mib}


def _rss_mib(pid: int) -> float:
    process = psutil.Process(pid)
    return sum(each.memory_info().rss for each in [process, *process.children(recursive=True)]) / 2**20

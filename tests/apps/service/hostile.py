"""What strangers send: altered bytes; and what a worker says that they took over, targets of processes, so that this
module imports little."""

import os
import pickle
import struct
import time


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def answering(line, make):
    line.send_bytes(b"+")
    while True:
        asked = line.recv_bytes()
        make(asked)


def pickles(line, cards, bounds):
    """Each question has the path for a payload in it."""

    def answer(asked):
        path = asked[asked.index(b"<") + 1 : asked.index(b">")].decode()
        line.send_bytes(pickle.dumps((True, Payload(path))))

    answering(line, answer)


def pickles_at_once(line, cards, bounds):
    line.send_bytes(pickle.dumps(Payload(os.environ["PAYLOAD"])))
    time.sleep(60)


def endless(line, cards, bounds):
    """Says that a terabyte follows."""
    answering(line, lambda asked: os.write(line.fileno(), struct.pack("!i", -1) + struct.pack("!Q", 1 << 40)))


def large(line, cards, bounds):
    answering(line, lambda asked: line.send_bytes(bytes(1 << 20)))


def empty(line, cards, bounds):
    answering(line, lambda asked: line.send_bytes(b""))


def another_kind(line, cards, bounds):
    answering(line, lambda asked: line.send_bytes(b"system rm"))


def controls(line, cards, bounds):
    answering(line, lambda asked: line.send_bytes(b"-\x1b[31m\xff no\n" + b"x" * 2000))


def dies(line, cards, bounds):
    pass


def altered(data: bytes, rng, starts=(0,), most: int = 3) -> bytes:
    """One to ``most`` alterations, more of them near a start."""
    data = bytearray(data)
    for _ in range(rng.integers(1, most + 1)):
        near, kind = rng.random() < 0.6, rng.integers(7)
        at = int(rng.choice(starts) + rng.integers(200)) if near else int(rng.integers(len(data) + 1))
        if kind == 0 and at < len(data):
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at : at + 8] = rng.bytes(8)
        elif kind == 3:
            data[at:at] = rng.bytes(int(rng.integers(1, 60)))
        elif kind == 4:
            data[at : at + 8] = int(rng.choice([0, 1, 255, 1 << 31, (1 << 32) - 1, 1 << 40])).to_bytes(8, "little")
        elif kind == 5:
            data[at:at] = data[: int(rng.integers(300))]
        else:
            other = int(rng.integers(len(data) + 1))
            data[at : at + 64] = data[other : other + 64]
    return bytes(data)

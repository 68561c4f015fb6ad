"""What a worker may say that a stranger took over: targets of processes, in a module that imports little."""

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


def pickles(line, cards):
    """Each question has the path for a payload in it."""

    def answer(asked):
        path = asked[asked.index(b"<") + 1 : asked.index(b">")].decode()
        line.send_bytes(pickle.dumps((True, Payload(path))))

    answering(line, answer)


def pickles_at_once(line, cards):
    line.send_bytes(pickle.dumps(Payload(os.environ["PAYLOAD"])))
    time.sleep(60)


def endless(line, cards):
    """Says that a terabyte follows."""
    answering(line, lambda asked: os.write(line.fileno(), struct.pack("!i", -1) + struct.pack("!Q", 1 << 40)))


def large(line, cards):
    answering(line, lambda asked: line.send_bytes(bytes(1 << 20)))


def empty(line, cards):
    answering(line, lambda asked: line.send_bytes(b""))


def another_kind(line, cards):
    answering(line, lambda asked: line.send_bytes(b"system rm"))


def controls(line, cards):
    answering(line, lambda asked: line.send_bytes(b"-\x1b[31m\xff no\n" + b"x" * 2000))

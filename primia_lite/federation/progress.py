"""What a person sees of a run: a bar and a curve that grow in a notebook, one line a round elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

from primia_lite.runtime import in_notebook

_SHOWN = {"auroc": "AUROC", "accuracy": "accuracy", "loss": "loss"}


@contextmanager
def shown(progress: Callable[[dict], None] | str | None, rounds: int, done: list[dict]) -> Iterator[Callable]:
    """What is called with each round's record: a function of one's own, nothing, or a title's bar, curve and lines.

    ``done`` are the records of rounds that a resumed run has behind it.
    """
    if not isinstance(progress, str):
        yield progress or (lambda record: None)
        return
    with closing(_Shown(progress, rounds, done)) as show:
        yield show


class _Shown:
    def __init__(self, title: str, rounds: int, done: list[dict]):
        self.title, self.rounds = title, rounds
        self.records = list(done)
        self.live = in_notebook()
        self.drawn = 0.0
        if self.live:
            from IPython.display import display
            from tqdm.auto import tqdm

            self.bar = tqdm(total=rounds, initial=len(done), desc=title, unit="round")
            self.curve = display(display_id=True)
        elif done:
            print(f"{title}: goes on after round {len(done)} of {rounds}")

    def __call__(self, record: dict) -> None:
        self.records.append(record)
        shown = {name: f"{record[key]:.3f}" for key, name in _SHOWN.items() if key in record}
        if not self.live:
            values = "  ".join(f"{name} {value}" for name, value in shown.items())
            number = f"{record['round']:>{len(str(self.rounds))}}/{self.rounds}"
            print(f"{self.title}: round {number}  {values}".rstrip(), flush=True)
            return
        self.bar.update()
        self.bar.set_postfix(shown)
        if time.monotonic() - self.drawn > 1.0 or record["round"] == self.rounds:
            self._draw()

    def _draw(self) -> None:
        import matplotlib.pyplot as plt

        from primia_lite.plotting import plot_history

        if "auroc" not in self.records[-1]:
            return
        figure = plot_history({self.title: self.records}, self.rounds)
        self.curve.update(figure)
        plt.close(figure)
        self.drawn = time.monotonic()

    def close(self) -> None:
        if self.live:
            self.bar.close()

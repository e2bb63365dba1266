"""What a run leaves for people: CSV files, TensorBoard's, and a picture of the learning curve."""

from __future__ import annotations

import csv
import io
import time
from pathlib import Path
from typing import Any

from parnet_kernels.files import write_whole

STEPS = ("step", "epoch", "lr", "loss", "images_per_second")
EPOCHS = ("epoch", "step", "lr", "loss", "val_loss", "top1", "top5", "images_per_second", "seconds")
PICTURE_EVERY = 60  # seconds


class Table:
    """A CSV file that grows by rows; rows after `step` are cut off: they are of work that was lost."""

    def __init__(self, path: Path, columns: tuple[str, ...], step: int) -> None:
        self._path, self._columns = path, columns
        self.rows: list[dict[str, float]] = []
        if step and path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    try:
                        values = {name: float(row[name]) if row[name] else float("nan") for name in columns}
                    except (KeyError, TypeError, ValueError):
                        break  # cut off in the middle
                    if values["step"] > step:
                        break
                    self.rows.append(values)
        write_whole(path, "".join([self._line(columns), *map(self._text, self.rows)]).encode())

    def add(self, **values: float) -> None:
        self.rows.append(values)
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(self._text(values))
        except OSError as error:
            raise OSError(f"cannot write {self._path}: {error}") from error

    def _text(self, row: dict[str, float]) -> str:
        def shown(v: float) -> str:
            return "" if v != v else str(int(v)) if v == int(v) and abs(v) < 1e15 else repr(v)

        return self._line(tuple(shown(row[name]) for name in self._columns))

    @staticmethod
    def _line(cells: tuple[str, ...]) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(cells)
        return text.getvalue()


class Logs:
    """Of the run in `folder`, from `step` on. tensorboard: whether to write its files too, where it is installed."""

    def __init__(self, folder: Path, step: int, tensorboard: bool) -> None:
        self._folder = folder
        self.steps = Table(folder / "steps.csv", STEPS, step)
        self.epochs = Table(folder / "epochs.csv", EPOCHS, step)
        self._board: Any = None
        self._drawn = time.monotonic()
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                return
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def step(self, **values: float) -> None:
        self.steps.add(**values)
        self._scalars("steps", values)

    def epoch(self, **values: float) -> None:
        self.epochs.add(**values)
        self._scalars("epochs", values)
        if time.monotonic() > self._drawn + PICTURE_EVERY:
            self.draw()

    def _scalars(self, group: str, values: dict[str, float]) -> None:
        if self._board is not None:
            for name, value in values.items():
                if name not in ("step", "epoch") and value == value:
                    self._board.add_scalar(f"{group}/{name}", value, int(values["step"]))

    def draw(self) -> bool:
        """The learning curve, `curve.png`; whether it was drawn. No reason to stop if it was not."""
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError:
            return False
        self._drawn = time.monotonic()
        rows = self.epochs.rows
        figure = Figure(figsize=(10, 4), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        epochs = [row["epoch"] for row in rows]
        steps = max((row["step"] for row in rows), default=1) / max(epochs, default=1)
        left.plot([r["step"] / steps for r in self.steps.rows], [r["loss"] for r in self.steps.rows],
                  color="tab:gray", linewidth=0.7, label="training, some steps")  # fmt: skip
        left.plot(epochs, [row["loss"] for row in rows], label="training, with augmentation and smoothing")
        left.plot(epochs, [row["val_loss"] for row in rows], label="validation")
        left.set(xlabel="epoch", ylabel="cross-entropy")
        left.legend()
        right.plot(epochs, [100 * row["top1"] for row in rows], label="top 1")
        right.plot(epochs, [100 * row["top5"] for row in rows], label="top 5")
        right.set(xlabel="epoch", ylabel="% of validation pictures")
        right.legend()
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=100)
        try:
            write_whole(self._folder / "curve.png", content.getvalue())
        except OSError:
            return False
        return True

    def close(self) -> None:
        self.draw()
        if self._board is not None:
            self._board.close()

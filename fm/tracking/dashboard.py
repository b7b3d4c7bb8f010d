"""The TensorBoard of a run (tags: README, "Watch")."""

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from fm.report.cosines import Cosines, cosine_figure
from fm.report.sample import Sample
from fm.tracking.layout import custom_scalars
from fm.tracking.pictures import figure_png, rollout_pictures
from fm.tracking.trackers import Trackers


class Dashboard:
    """Scalars, texts and pictures by step. Scalars go to `trackers` too."""

    def __init__(
        self,
        directory: Path,
        datasets: Iterable[str],
        windows: Iterable[str],
        resume_step: int,
        saved: Mapping[str, Any] | None = None,
        trackers: Trackers | None = None,
    ) -> None:
        """`windows` are the rollout windows of the validation protocol.

        Events from `resume_step` on are purged: a killed run may have written any of them. `saved` (see `settle`) is
        what that step had when its checkpoint was written; its validation is made again.
        """
        self.writer = SummaryWriter(str(directory), purge_step=resume_step, flush_secs=10)
        self._step, self._scalars, self._texts = resume_step, dict[str, float](), list[tuple[str, str]]()
        self._trackers: Trackers | None = None  # what was saved, they have been told
        if not resume_step:
            self.writer.add_custom_scalars(custom_scalars(datasets, windows))
        elif saved:
            self.scalars(saved["scalars"], resume_step)
            for tag, body in saved["texts"]:
                self.text(tag, body, resume_step)
        self._trackers = trackers

    def text(self, tag: str, body: str, step: int) -> None:
        self._at(step)
        self._texts.append((tag, body))
        self.writer.add_text(tag, body, step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write finite and non-finite values alike, under their tags; one event for all, at half the bytes."""
        self._at(step)
        self._scalars.update(values)
        parts = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self.writer.file_writer.add_summary(Summary(value=parts), step)
        if self._trackers:
            self._trackers.log(values, step)

    def settle(self, step: int) -> dict[str, Any]:
        """Let the files hold all that was written; returns the scalars and texts of `step`, for `saved`."""
        self._at(step)
        self.writer.flush()
        return {"scalars": dict(self._scalars), "texts": list(self._texts)}

    def rollout(self, sample: Sample, step: int) -> None:
        """Pictures of a rollout, still and moving."""
        for name, encoded in rollout_pictures(sample).items():
            self._picture(f"{sample.dataset}/{name}", encoded, step)

    def cosines(self, cosines: Cosines, step: int, picture: bool) -> None:
        """Each dataset's mean cosine with the others' gradients; with `picture`, a heat map of them all."""
        means = cosines.with_others()
        self.scalars({f"gradients/mean_cosine/{name}": value for name, value in means.items()}, step)
        if picture:
            self._picture("gradients/cosine", figure_png(cosine_figure(cosines, f"step {step}")), step)

    def close(self) -> None:
        self.writer.close()

    def _at(self, step: int) -> None:
        if step != self._step:
            self._step, self._scalars, self._texts = step, {}, []

    def _picture(self, tag: str, encoded: bytes, step: int) -> None:
        """A PNG or a GIF as it is: a browser plays it."""
        width, height = Image.open(io.BytesIO(encoded)).size
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded)
        self.writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)

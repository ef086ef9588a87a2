"""The images that a worker trains on: loaded once, and refused unless they are the study's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from headsearch.config import DataConfig
from headsearch.core.images import ImageSet, load_images
from headsearch.errors import DataError
from headsearch.runtime.preflight import notes_of, told_of
from headsearch.runtime.session import Session
from headsearch.search.imagesets import image_key, settle
from headsearch.search.studies import Study


class StudyImages:
    """The image sets of one study.

    `place` puts a set on the worker's device; `patiently` calls while the database is away; `say` gets what
    is worth a note, each line once: of a study made without a check of its data nobody has said it yet.
    """

    def __init__(
        self,
        session: Session,
        study: Study,
        place: Callable[[ImageSet], ImageSet],
        patiently: Callable[[Any], Any],
        say: Callable[[str], None],
    ) -> None:
        self._session, self._study, self._place = session, study, place
        self._patiently, self._say = patiently, say
        self._said: set[str] = set()
        self._loaded: dict[str, ImageSet] = {}

    def load(self, data: DataConfig) -> ImageSet:
        """Return the images of a trial, those of an earlier one where they are the same.

        Raises DataError unless they are the images that the study's other trials were trained on.
        """
        key = image_key(data)
        if key not in self._loaded:
            images = load_images(data, home=self._session.home)
            for line in notes_of(data, images):
                if line not in self._said:
                    self._said.add(line)
                    self._say(line)
            known = self._patiently(
                lambda: settle(self._session.database, self._study, told_of(data, images))
            )
            if known.fingerprint != images.fingerprint:
                raise DataError(
                    f"data: the images of {data.root or data.name} are not those that study "
                    f"{self._study.name} is trained on (fingerprint {images.fingerprint[:12]}, the study's "
                    f"{known.fingerprint[:12]}); restore them, or make a new study of these"
                )
            self._loaded[key] = self._place(images)
        return self._loaded[key]

    def forget(self) -> None:
        """Free their memory."""
        self._loaded.clear()

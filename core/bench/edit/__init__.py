"""``conceptkit bench edit``: is a concept gone, is everything else still there, can it be brought back, and how long does it take?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import Entry, chosen

if TYPE_CHECKING:
    from .. import Profile
    from ..frame import Suite


def _make(profile: Profile, model: str, methods: str) -> Suite:
    from .suite import EditSuite, erasing

    return EditSuite(profile, model, chosen(erasing(), methods))


ENTRY = Entry(
    about="Measure edits where the answer is known: concepts of the demo model before and after, attacks on them, and speed at real sizes.",
    methods="Which methods, separated by commas; by default those of the profile.",
    listed="",
    make=_make,
)

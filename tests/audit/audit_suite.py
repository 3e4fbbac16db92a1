"""All tables of the fault suite, with what every part of it has put there."""

from __future__ import annotations

import audit_hazards  # noqa: F401
import audit_hidden  # noqa: F401
import audit_stillness  # noqa: F401
from audit_faults import CORRECT, FAULTS, HAZARDS, Entry, audited

__all__ = ["CORRECT", "FAULTS", "HAZARDS", "Entry", "audited"]

"""Makes the modules of `examples/emoji` importable: what fetches, converts and draws there is used here as it is."""

from __future__ import annotations

import sys
from pathlib import Path

EMOJI = Path(__file__).resolve().parents[1] / "emoji"
if str(EMOJI) not in sys.path:
    sys.path.append(str(EMOJI))

"""The status page: live sessions, latencies, and what a chosen robot sees and thinks. Knows its own HTML only.

One document without any outside resource. Its script reads the admin routes of the endpoint that served it; the browser
sends along the key it was opened with. Everything that came from a robot is shown as text, never as HTML.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from importlib import resources

_SCRIPT = "/*SCRIPT*/"
_POLICY = "CONTENT_SECURITY_POLICY"


@functools.cache
def page() -> str:
    """HTML whose content security policy allows its own script, by hash, and nothing from elsewhere."""
    folder = resources.files("dualvla_serve") / "monitoring"
    script = (folder / "status.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src blob:; "
        "connect-src 'self'; form-action 'none'; base-uri 'none'"
    )
    html = (folder / "status.html").read_text(encoding="utf-8")
    return html.replace(_POLICY, policy).replace(_SCRIPT, script)

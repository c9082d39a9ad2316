"""The description that a package index shows: the README, with links that work there.

STAFF_URL, where the repository lies (https://host/owner/name), makes its links whole; without one they become
plain names, since a file of the repository can't be reached from an index.
"""

import os
import re
from pathlib import Path

from setuptools import setup

URL = os.environ.get("STAFF_URL", "").rstrip("/")


def whole(link: re.Match[str]) -> str:
    is_picture, text, target = link.groups()
    if re.match(r"(https?:|#|mailto:)", target):
        return link[0]
    if is_picture:
        return f"![{text}]({URL}/raw/main/{target})" if URL else f"*{text}*"
    return f"[{text}]({URL}/blob/main/{target})" if URL else f"`{target}`"


setup(
    long_description=re.sub(
        r"(!?)\[([^]]*)\]\(([^)\s]+)\)", whole, Path("README.md").read_text(encoding="utf-8")
    ),
    long_description_content_type="text/markdown",
    **({"project_urls": {"Source": URL}} if URL else {}),
)

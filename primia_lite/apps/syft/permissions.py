"""Who may read and write a datasite's files, as syft's rules say, without parsing each rule again for each file.

syft 0.10 reads every permission file of a datasite anew for every file that it sends or is sent; parsing them was a
third of a round's time. They are read as often here, so that what they say holds at once, and a text is parsed once.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import yaml
from syft_permissions import ACLService
from syft_permissions.spec.ruleset import PERMISSION_FILE_NAME, RuleSet


@lru_cache(maxsize=4096)
def _parsed(text: bytes) -> RuleSet:
    return RuleSet.model_validate(yaml.safe_load(text) or {})


class Permissions(ACLService):
    """syft's own service."""

    def load_permissions_from_filesystem(self, datasite: Path) -> None:
        self.tree = type(self.tree)()
        for file in Path(datasite).rglob(PERMISSION_FILE_NAME):
            rules = _parsed(file.read_bytes()).model_copy(deep=True)
            folder = file.parent.relative_to(datasite).as_posix()
            rules.path = "" if folder == "." else folder
            self.add_ruleset(rules)

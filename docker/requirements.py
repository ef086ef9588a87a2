"""Writes pyproject.toml's dependencies to torch.txt and, with the extras that $EXTRAS names, to rest.txt."""

import os
import re
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
wanted = list(project["dependencies"])
for extra in os.environ.get("EXTRAS", "").replace(",", " ").split():
    wanted += project["optional-dependencies"][extra]
torch = [line for line in wanted if re.match(r"torch(vision)?\b", line)]
rest = [line for line in wanted if line not in torch]
Path("torch.txt").write_text("\n".join(torch) + "\n", encoding="utf-8")
Path("rest.txt").write_text("\n".join(rest) + "\n", encoding="utf-8")

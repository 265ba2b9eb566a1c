"""Importing this lets timm be imported beside a torchvision that was built for another torch."""

from __future__ import annotations

from maskattn.torchvision_names import name_operators

keeps_operators = name_operators()  # they go with what registered them

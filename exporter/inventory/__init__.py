"""What each workload talks to, kept over restarts: the egress inventory."""

from exporter.inventory.book import check
from exporter.inventory.watch import Inventory

__all__ = ["Inventory", "check"]

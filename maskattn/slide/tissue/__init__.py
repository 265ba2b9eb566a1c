"""Find the tissue of a slide on a coarse view of it, or read the user's own mask."""

from maskattn.slide.tissue.finding import InkRule, find_tissue
from maskattn.slide.tissue.mask import TissueMask
from maskattn.slide.tissue.mask_file import load_mask
from maskattn.slide.tissue.outlined import limit_tissue

__all__ = ["InkRule", "TissueMask", "find_tissue", "limit_tissue", "load_mask"]

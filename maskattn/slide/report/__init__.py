"""Write the report on a run as one self-contained HTML file, or show one slide's section in a notebook."""

from maskattn.slide.report.page import write_report
from maskattn.slide.report.shown_slide import ShownSlide, show

__all__ = ["ShownSlide", "show", "write_report"]

"""The report: one HTML file that stands alone, with every slide of a folder of outputs, and a slide's part of it."""

from maskattn.slide.report.page import write_report
from maskattn.slide.report.shown_slide import ShownSlide, show

__all__ = ["ShownSlide", "show", "write_report"]

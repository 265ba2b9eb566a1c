"""Turn the files, folders, globs and tables that a user names into one job per slide."""

from maskattn.slide.manifest.folder_search import SLIDE_SUFFIXES
from maskattn.slide.manifest.jobs import SlideJob, collect_jobs, read_manifest

__all__ = ["SLIDE_SUFFIXES", "SlideJob", "collect_jobs", "read_manifest"]

"""The viewer: slides and their maps in a browser, served only on the loopback address.

``server.py`` checks a request's origin and passes it to ``answers.py``, which handles the URLs. These identify slides
by number, so that no part of a URL ever becomes part of a file path. ``assets/`` holds the page.
"""

"""The viewer: slides and their maps in a browser, served on the loopback address alone.

A request goes through ``server.py``, which refuses other hosts, to ``answers.py``, which knows the addresses; these
name slides by number, so that no part of an address ever becomes part of a path. ``assets/`` is the page.
"""

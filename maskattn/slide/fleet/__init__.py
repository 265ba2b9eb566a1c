"""Many processes, on one machine or many, that share the slides of one output folder.

There is no server and no lock: what the processes know of each other are small files in ``OUT/.fleet``. A process that
runs slides is a *member* of the fleet; a slide is *claimed* by a file that only one can create; a slide that has
*ended* is marked by another. Whoever leaves last puts the folder away.
"""

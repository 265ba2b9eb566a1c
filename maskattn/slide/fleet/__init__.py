"""Share the slides of one output folder among processes on one or several machines.

There is no server and no lock: the processes communicate through small files in ``OUT/.fleet``. A process that runs
slides is a *member* of the fleet; a slide is *claimed* by a file that only one process can create, and another file
marks it as *ended*. The last process to leave removes the folder.
"""

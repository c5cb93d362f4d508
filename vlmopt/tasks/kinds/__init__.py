"""One file for each kind of task: how it binds to a program, and what its workload feeds and scores."""

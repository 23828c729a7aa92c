"""What is written for readers and shells from what the program itself is made of: the config types and the command line's parser.

Stands beside the package and is never imported by it. `python packaging/generate docs` rewrites the committed references, `install
DIR` makes what an installation has beside the program: manual pages and shell completions.
"""

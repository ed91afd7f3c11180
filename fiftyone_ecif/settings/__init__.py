"""What a user can choose: one table of options for each job, from which all else follows.

Each option is a field of a frozen dataclass, declared once with its default, its
bounds and what it means. The arguments of the public functions, the record of a
run, the flags of the shell, the inputs of the App's forms and the tables in the
documentation are made from it. Imports nothing heavy.
"""

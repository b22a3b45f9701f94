"""`--report`: one self-contained page of a command's JSON document."""

"""`python -m doconv_convert` is `doconv-convert`."""

from doconv_convert.cli.app import main

main()

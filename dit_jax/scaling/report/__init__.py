"""What a reader sees of fits: texts and JSON (`text`), figures (`figures`), a page (`page`), and all of them in a folder (`save`)."""

"""Reports in the forms that continuous integration reads; each in a module of its own."""

FORMATS = ("text", "json", "junit", "sarif", "github")

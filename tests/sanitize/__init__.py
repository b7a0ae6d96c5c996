"""The C-level core under the sanitizers: several threads of one process over one arena, and the lives of its objects."""

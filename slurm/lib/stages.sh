# shellcheck shell=bash
# Names that the preparing, merging and watching scripts agree on.

# Each language has an output directory of its own while it is prepared, so that tasks of an array never write to one file.
parts_of() { # SHARDS
  echo "${1%/}.parts"
}

# Languages of a directory of texts, by the files' names: en.txt.xz, zh-Hans.jsonl.gz, sw.parquet
languages_of() { # TEXT_DIR
  local file
  for file in "$1"/*.*; do
    if [[ -f $file ]]; then basename "$file" | cut -d. -f1; fi
  done | sort -u
}

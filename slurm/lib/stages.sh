# shellcheck shell=bash
# Names that the scripts for prepare, merge and status share.

# Each language is prepared in its own directory, so that two tasks of an array never write to one file.
parts_of() { # SHARDS
  echo "${1%/}.parts"
}

how_to_get_tokenizer() { # TOKENIZER
  echo "It is a SentencePiece model, or a directory with one: the teacher's. To download a hub model (on a node with network):" \
    "hf download ${1@Q} --local-dir DIRECTORY"
}

# File name endings that data_prep reads, in lower case (a test compares this with data_prep's own rule).
TEXT_ENDINGS='(txt|jsonl|ndjson)(\.(xz|gz|zst|bz2))?|json\.(xz|gz|zst|bz2)|parquet'
is_text() { # FILE
  [[ ${1,,} =~ \.($TEXT_ENDINGS)$ ]]
}

# The names of CC-100's languages, from data_prep's own table.
known_languages() {
  sed -n '/^CC100/,/split()/{s/"""/ /g;s/\.split()//;s/^CC100.*frozenset(//;p}' data_prep/languages.py | tr -s ' )' '\n'
}

# The text files of one language: TEXT_DIR/de.txt.xz, de.part-1.jsonl, ..., and everything below TEXT_DIR/de/
texts_of() { # TEXT_DIR LANGUAGE
  local file
  for file in "$1/$2".*; do
    if [[ -f $file ]] && is_text "$file"; then printf '%s\n' "$file"; fi
  done
  if [[ -d $1/$2 ]]; then printf '%s\n' "$1/$2"; fi
}

# Languages of a directory of texts, from the names of its files and directories: en.txt.xz, zh-Hans.jsonl.gz, sw/part-1.txt.
# Other names (README.txt, SHA256SUMS, index.html) are not languages; they are listed on standard error.
languages_of() { # TEXT_DIR
  local entry name known found=() left_out=()
  known=$'\n'$(known_languages)$'\n'
  for entry in "$1"/* "$1"/.[!.]*; do
    [[ -e $entry || -L $entry ]] || continue # a pattern that nothing matches
    name=$(basename "$entry")
    if [[ $known == *$'\n'"${name%%.*}"$'\n'* && ${name%%.*} ]] && holds_text "$entry"; then
      found+=("${name%%.*}")
    else
      left_out+=("${name@Q}")
    fi
  done
  if ((${#left_out[@]})); then
    note "$1: skipped, because the name is not that of a CC-100 language's text: ${left_out[*]:0:10}$( ((${#left_out[@]} <= 10)) ||
      echo " and $((${#left_out[@]} - 10)) more"). To prepare a language of another name, give it: --languages, or LANGUAGE" >&2
  fi
  ((${#found[@]} == 0)) || printf '%s\n' "${found[@]}" | LC_ALL=C sort -u
}

# A text file, or a directory that is named like a language and holds a text file.
holds_text() { # FILE_OR_DIRECTORY
  if [[ -d $1 ]]; then
    [[ ${1##*/} != *.* ]] && [[ $(find -L "$1" -type f -regextype posix-extended \
      -iregex ".*\.($TEXT_ENDINGS)" -print -quit) ]]
  else
    [[ -f $1 ]] && is_text "$1"
  fi
}

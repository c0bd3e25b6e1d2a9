#!/bin/bash
# Stands in for apptainer and enroot as far as pulling goes. $STUB_DO: `whole` an image, `cut` off, `junk`,
# `fails`, `full` (no space left), `hangs` (until $STUB_GO is there). Each call is one line of $STUB_CALLS.
echo "$PPID $0 $*" >>"$STUB_CALLS"
env | grep -E '_(CACHEDIR|TMPDIR|CACHE_PATH|TEMP_PATH)=' >>"$STUB_CALLS.env"
target=
for word in "$@"; do
  case $word in *.sif | *.sqsh) target=$word ;; esac
done
case $STUB_DO in
  fails) echo "FATAL: no such image" >&2; exit 255 ;;
  full) head -c 100 "$STUB_IMAGE" >"$target"; echo "write: no space left on device" >&2; exit 1 ;;
  junk) echo "<html>please log in</html>" >"$target"; exit 0 ;;
  cut) head -c 300 "$STUB_IMAGE" >"$target"; exit 0 ;;
  hangs) head -c 100 "$STUB_IMAGE" >"$target"; until [ -e "$STUB_GO" ]; do sleep 0.05; done ;;
esac
cp "$STUB_IMAGE" "$target"

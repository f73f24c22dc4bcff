#!/usr/bin/env bash
# Builds the programs of the test cluster from the pinned Go modules, static and stripped, and
# prints their folder. After an interrupted build, the compiler's cache is reused; after a complete
# one, nothing is built.
set -euo pipefail
cd "$(dirname "$0")"

kubernetes_version() { # version
    local package
    for package in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
        printf -- '-X %s.gitVersion=v%s ' $package "$1"
        printf -- '-X %s.gitMajor=%s ' $package "${1%%.*}"
        printf -- '-X %s.gitMinor=%s ' $package "$(cut -d. -f2 <<<"$1")"
        printf -- '-X %s.gitTreeState=archive ' $package
    done
}
# folder of go.mod | output in bin/ | packages | linker flags with versions
# Programs that can share library versions are in one module: compiling libraries is most of the
# work.
CMD=k8s.io/kubernetes/cmd
PROGRAMS=(
    "etcd|etcd|go.etcd.io/etcd/server/v3|"
    "control-plane||$CMD/kube-apiserver $CMD/kube-controller-manager $CMD/kube-scheduler \
$CMD/kubectl sigs.k8s.io/kwok/cmd/kwok sigs.k8s.io/kwok/cmd/kwokctl ./coredns ./pause\
|$(kubernetes_version 1.37.2) -X sigs.k8s.io/kwok/pkg/consts.Version=v0.8.0"
    "node||$CMD/kubelet $CMD/kube-proxy|$(kubernetes_version 1.34.4)"
    "training-operator|training-operator\
|github.com/kubeflow/training-operator/cmd/training-operator.v1|"
)
OPERATOR=github.com/kubeflow/training-operator

KEY=$(cat build.sh ./*/go.mod ./*/go.sum ./*/*/main.go | sha256sum | cut -c1-16)
FOLDER="${CONVOY_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/convoy}/cluster-$KEY"
mkdir -p "$FOLDER/bin"
[ -e "$FOLDER/complete" ] && { echo "$FOLDER"; exit 0; }
command -v go >/dev/null \
    || { echo "cluster: Go is needed to build the cluster's programs; install it" >&2; exit 2; }

# One build at a time: a concurrent one would repeat all the work.
exec 9>"$FOLDER/lock"
flock -n 9 || { echo "cluster: waiting for another build into $FOLDER" >&2; flock 9; }
# Debug information is stripped anyway. Less frequent garbage collection of the compiler trades
# memory for a fifth of its time.
export CGO_ENABLED=0 GOTOOLCHAIN=local GOGC=400
for entry in "${PROGRAMS[@]}"; do
    IFS='|' read -r module program packages versions <<<"$entry"
    start=$SECONDS
    echo "cluster: compiling $(wc -w <<<"$packages") programs of $module" >&2
    # shellcheck disable=SC2086 # one word each
    (cd "$module" && go build -trimpath -buildvcs=false -gcflags=all=-dwarf=false \
        -ldflags "-s -w $versions" -o "$FOLDER/bin/$program" $packages) >&2
    echo "cluster: built $module in $((SECONDS - start)) s" >&2
done
# The operator's manifests are from its module, so that they match the program.
if [ ! -e "$FOLDER/training-operator" ]; then
    rm -rf "$FOLDER/.training-operator"
    cp -r "$(cd training-operator && go list -m -f '{{.Dir}}' "$OPERATOR")/manifests" \
        "$FOLDER/.training-operator"
    chmod -R u+w "$FOLDER/.training-operator"
    mv "$FOLDER/.training-operator" "$FOLDER/training-operator"
fi
touch "$FOLDER/complete"
echo "$FOLDER"

#!/usr/bin/env bash
# Builds the test cluster's programs from the pinned Go modules, static and stripped, and prints the folder that holds them.
# The compiler's own cache keeps what an interrupted build made; a second call after a whole one builds nothing.
set -euo pipefail
cd "$(dirname "$0")"

kubernetes_version() { # version
    local package
    for package in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
        printf -- '-X %s.gitVersion=v%s -X %s.gitMajor=%s -X %s.gitMinor=%s -X %s.gitTreeState=archive ' \
            $package "$1" $package "${1%%.*}" $package "$(cut -d. -f2 <<<"$1")" $package
    done
}
# folder of go.mod | what it makes below bin/ | packages | linker flags that name versions
# One module for as many as can stand on the same libraries: those are most of the work.
PROGRAMS=(
    "etcd|etcd|go.etcd.io/etcd/server/v3|"
    "control-plane||k8s.io/kubernetes/cmd/kube-apiserver k8s.io/kubernetes/cmd/kube-controller-manager k8s.io/kubernetes/cmd/kube-scheduler \
k8s.io/kubernetes/cmd/kubectl sigs.k8s.io/kwok/cmd/kwok sigs.k8s.io/kwok/cmd/kwokctl ./coredns ./pause\
|$(kubernetes_version 1.37.2) -X sigs.k8s.io/kwok/pkg/consts.Version=v0.8.0"
    "node||k8s.io/kubernetes/cmd/kubelet k8s.io/kubernetes/cmd/kube-proxy|$(kubernetes_version 1.34.4)"
    "training-operator|training-operator|github.com/kubeflow/training-operator/cmd/training-operator.v1|"
)
OPERATOR=github.com/kubeflow/training-operator

KEY=$(cat build.sh ./*/go.mod ./*/go.sum ./*/*/main.go | sha256sum | cut -c1-16)
FOLDER="${CONVOY_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/convoy}/cluster-$KEY"
mkdir -p "$FOLDER/bin"
[ -e "$FOLDER/complete" ] && { echo "$FOLDER"; exit 0; }
command -v go >/dev/null || { echo "cluster: Go is needed to build the cluster's programs" >&2; exit 2; }

# One build at a time: a second one would do all the work again beside the first.
exec 9>"$FOLDER/lock"
flock -n 9 || { echo "cluster: waiting for another build into $FOLDER" >&2; flock 9; }
# What debuggers need is stripped anyway, and collecting the compiler's garbage less often trades memory for a fifth of its time.
export CGO_ENABLED=0 GOTOOLCHAIN=local GOGC=400
for entry in "${PROGRAMS[@]}"; do
    IFS='|' read -r module program packages versions <<<"$entry"
    start=$SECONDS
    echo "cluster: compiling $(wc -w <<<"$packages") programs of $module" >&2
    # shellcheck disable=SC2086 # one word each
    (cd "$module" && go build -trimpath -buildvcs=false -gcflags=all=-dwarf=false -ldflags "-s -w $versions" -o "$FOLDER/bin/$program" $packages) >&2
    echo "cluster: built $module in $((SECONDS - start)) s" >&2
done
# The operator's manifests come with its module, so that they fit the program.
if [ ! -e "$FOLDER/training-operator" ]; then
    rm -rf "$FOLDER/.training-operator"
    cp -r "$(cd training-operator && go list -m -f '{{.Dir}}' "$OPERATOR")/manifests" "$FOLDER/.training-operator"
    chmod -R u+w "$FOLDER/.training-operator"
    mv "$FOLDER/.training-operator" "$FOLDER/training-operator"
fi
touch "$FOLDER/complete"
echo "$FOLDER"

#!/bin/sh
# Creates the database on the first start, then runs the server.
set -eu
POSTGRES_USER="${POSTGRES_USER:-postgres}"
if [ "$1" = postgres ] && [ ! -s "$PGDATA/PG_VERSION" ]; then
    password="${POSTGRES_PASSWORD:?must be set}"
    file=$(mktemp)
    printf '%s\n' "$password" > "$file"
    initdb --username "$POSTGRES_USER" --pwfile "$file" --auth-host scram-sha-256 \
        --auth-local scram-sha-256 --encoding UTF8 >/dev/null
    rm "$file"
    echo "host all all all scram-sha-256" >> "$PGDATA/pg_hba.conf"
    if [ "${POSTGRES_DB:-$POSTGRES_USER}" != postgres ]; then
        # In single-user mode, no client can connect before the database exists.
        echo "CREATE DATABASE \"${POSTGRES_DB:-$POSTGRES_USER}\";" \
            | postgres --single -j postgres >/dev/null
    fi
fi
[ "$1" = postgres ] && set -- "$@" -c listen_addresses='*'
exec "$@"

# PostgreSQL for the test cluster, with the variables of the official image that the manifests use:
# POSTGRES_USER, POSTGRES_PASSWORD, POSTGRES_DB, PGDATA. The root file system may be read-only;
# PGDATA, /var/run/postgresql and /tmp are volumes.
ARG BASE
FROM ${BASE}
RUN groupadd --gid 999 postgres \
    && useradd --uid 999 --gid 999 --home-dir /var/lib/postgresql \
        --shell /usr/sbin/nologin postgres \
    && apt-get update -qq \
    && apt-get install -y -qq --no-install-recommends postgresql \
    && rm -rf /var/lib/apt/lists/* /var/lib/postgresql/*/main \
    && ln -s /usr/lib/postgresql/*/bin /opt/postgresql
COPY postgres.sh /usr/local/bin/postgres.sh
ENV PATH=/opt/postgresql:/usr/local/bin:/usr/bin:/bin PGDATA=/var/lib/postgresql/data LANG=C.UTF-8
USER 999:999
EXPOSE 5432
ENTRYPOINT ["postgres.sh"]
CMD ["postgres"]
